"""The Lightning callback: when to probe, which module, and whom to hand the result."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer

from gmar_lightning.arguments import (
    ConfigurationError,
    beside_primary,
    check_counts,
    check_display,
    check_faithfulness_every,
    check_fit,
    check_modules,
    check_reactions,
    check_step_read,
    check_target,
    given_choice,
    given_probe,
    given_schedule,
    of_path,
)
from gmar_lightning.chosen import Choice
from gmar_lightning.explain.gmar import check_form
from gmar_lightning.explain.importance import Norm
from gmar_lightning.explain.output import Output
from gmar_lightning.explain.rollout import Rollout
from gmar_lightning.monitor.collapse import CollapseDetector
from gmar_lightning.monitor.record import Source
from gmar_lightning.monitor.settings import ProbeSettings, Target
from gmar_lightning.recording import Showing
from gmar_lightning.targets import name_of
from gmar_lightning.trainer import state_of_same_run
from gmar_lightning.watch import Plan, Watch


class GMARCallback(Callback):
    """Watch a Vision Transformer while it trains: heatmaps, head importance, heads that collapse.

    A fixed, class-balanced batch of validation images is explained before the first step, at every interval and at
    the end. Training is not disturbed: with and without the callback, the final weights are bit-identical.

    What is logged, on the x-axis of Lightning's own training rows, is the table of `show.keys`; its numbers are in
    `trainer.callback_metrics` too, for other callbacks to monitor.

    Args:
        every_n_train_steps: Probe after each so many optimizer steps, 100 when neither interval is given; "auto"
            keeps probes under 1 % of the time, the first and the last on top, and says which interval that is.
        every_n_epochs: Probe after each so many epochs, instead.
        num_images: Probe size, drawn class-balanced from the validation set, fixed for the run.
        num_heatmaps: How many of them are drawn.
        probe_batch: Your own `(images, labels)`, or a mapping with `images` and optionally `labels`.
        probe_images: Instead of a class-balanced draw: a folder (classes are the names of its folders), indices of
            the validation set, "hardest" or "misclassified" (among 256 images, before the first step).
        module: Dotted path of the classifier inside the LightningModule; None calls its forward. A list of paths
            (teacher and student, image and text tower, a moving average) watches each of them with a record folder,
            logged names (`gmar/<path>/...`) and flags of its own.
        target: "predicted", "label", a class index, or a callable on the output (`gmar_lightning.targets`); for
            several modules also a mapping from path to one of these.
        norm: "l1", "l2" or "uniform", see `gmar`.
        rollout: "gradient", "paper", "flow", "rollout" or "last_layer", see `gmar`; the record keeps all of them.
        log_rollouts: Forms whose pictures go to the loggers too, as `gmar/heatmaps_<form>`.
        residual: Weight of the residual path, 1 when None.
        micro_batch_size: Images per forward; None takes the whole probe at once.
        detector: The collapse detector; None switches it off.
        on_collapse: What to do when heads collapse: "warn", "alert" (W&B alert too), "stop" (graceful), or a
            callable `(trainer, pl_module, events)`, called on every process.
        confirm: Measure by ablation what newly flagged heads still contribute: five forwards over the probe
            images, and four with their backwards, at probes that flag, none at others.
        faithfulness_every: When the maps are tested (`show.keys`; about 125 forwards, and a backward of the probe):
            "ends" at the first and the last probe, a number after each so many more, None never.
        on_error: "warn" lets training go on after a failed probe, "raise" does not.
        mean: Channel means for display; found where possible, as `std` and `class_names`.
        std: Channel standard deviations for display.
        class_names: For captions.
        log_per_head: One scalar per head, hidden from automatic panels.
        max_events: Pictures of at most so many probes are logged; scalars always are.
        save_dir: Local record; `<trainer log dir>/gmar` when None.
        output: As for `gmar`; None finds out, from metrics, losses and labels too.
        verify: Whether the first probe also copies the weights, to see whether the forward writes them.
        read: "probe", or "step": no probes; L2 importance and contribution of each head are read off due training
            steps, of the loss on their batch, without a forward or a picture. Logged as `gmar_step/...`.
        inputs: A callable that makes of a validation batch what the forward takes, see `gmar`; for several modules
            also a mapping from path to callable. It sees batches on the CPU, after the batch-transfer hooks.

    Raises:
        ConfigurationError: For arguments that do not fit, with what to change.
    """

    def __init__(
        self,
        every_n_train_steps: int | Literal["auto"] | None = None,
        every_n_epochs: int | None = None,
        num_images: int = 32,
        num_heatmaps: int = 8,
        probe_batch: Any = None,
        module: str | Sequence[str] | None = None,
        target: Target | Mapping[str, Target] = "predicted",
        norm: Norm = "l1",
        rollout: Rollout = "gradient",
        residual: float | None = None,
        micro_batch_size: int | None = None,
        detector: CollapseDetector | Literal["default"] | None = "default",
        on_collapse: Literal["warn", "alert", "stop"] | Callable[..., None] = "alert",
        confirm: bool = True,
        faithfulness_every: int | Literal["ends"] | None = "ends",
        on_error: Literal["warn", "raise"] = "warn",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        class_names: Sequence[str] | None = None,
        log_per_head: bool = False,
        max_events: int = 100,
        save_dir: str | os.PathLike[str] | None = None,
        probe_images: str | os.PathLike[str] | Sequence[int] | None = None,
        verify: bool = True,
        log_rollouts: Sequence[Rollout] = (),
        read: Source = "probe",
        inputs: Callable[[Any], Any] | Mapping[str, Callable[[Any], Any]] | None = None,
        output: Output | None = None,
    ) -> None:
        super().__init__()
        paths = check_modules(module, read, target=target, inputs=inputs)
        try:
            schedule = given_schedule(every_n_train_steps, every_n_epochs, read)
            check_form(norm, rollout, residual, micro_batch_size, output)
            choice: Choice | None = given_choice(probe_images, probe_batch, inputs is not None)
            given = {path: given_probe(probe_batch, of_path(inputs, path)) for path in paths}
            beside = beside_primary(rollout, log_rollouts)
        except ValueError as error:
            raise ConfigurationError(str(error)) from None
        check_counts(num_images=num_images, num_heatmaps=num_heatmaps, max_events=max_events)
        check_faithfulness_every(faithfulness_every)
        check_reactions(on_error, on_collapse)
        for path in paths:
            goal = of_path(target, path)
            check_step_read(read, goal, probe_batch=probe_batch, probe_images=probe_images, residual=residual)
            check_target(goal, given[path])
        self.num_images, self.module, self.target = num_images, module, target
        self.norm, self.rollout = norm, rollout
        self.on_collapse: Literal["warn", "alert", "stop"] | Callable[..., None] = on_collapse
        self.on_error: Literal["warn", "raise"] = on_error
        self.read: Source = read
        self.save_dir, self.verify = save_dir, verify
        mean, std = check_display("mean", mean), check_display("std", std)
        plan = Plan(
            num_images=num_images,
            choice=choice,
            showing=Showing(num_heatmaps, mean, std, class_names, log_per_head, max_events, beside),
            detector=CollapseDetector() if detector == "default" else detector,
            on_collapse=on_collapse,
            on_error=on_error,
            save_dir=save_dir,
            verify=verify,
            read=read,
        )
        several = not isinstance(module, str | None)
        self.watches = tuple(
            Watch(
                plan,
                ProbeSettings(
                    target=of_path(target, path),
                    norm=norm,
                    rollout=rollout,
                    residual=residual,
                    module=path,
                    layer_prefix=f"{path}." if several else "",
                    inputs=of_path(inputs, path),
                    micro_batch_size=micro_batch_size,
                    confirm=confirm,
                    faithfulness_every=faithfulness_every,
                    drawn=num_heatmaps,
                    output=output,
                ),
                copy.deepcopy(schedule),
                given[path],
                path if several else None,
            )
            for path in paths
        )

    @property
    def detector(self) -> CollapseDetector | None:
        """The detector of the current run; of several modules, that of the first (`watches` has them all)."""
        return self.watches[0].prober.detector

    @property
    def state_key(self) -> str:
        """Tells apart several callbacks in one trainer."""
        schedule = self.watches[0].schedule
        return self._generate_state_key(
            unit=schedule.unit,
            interval=schedule.interval if schedule.fixed else "auto",
            num_images=self.num_images,
            module=self.module if isinstance(self.module, str | None) else list(self.module),
            target=name_of(self.target) if callable(self.target) else self.target,
            norm=self.norm,
            rollout=self.rollout,
            **({"read": "step"} if self.read == "step" else {}),  # older checkpoints know no other
            save_dir=None if self.save_dir is None else str(self.save_dir),
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work before anything is loaded."""
        if stage == "fit":
            check_fit(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the probe images, open or continue the record, and probe the untrained model."""
        for watch in self.watches:
            watch.begin(trainer, pl_module, self)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        """With `read="step"`: watch the batch if its step may be due."""
        for watch in self.watches:
            if watch.steps is not None:
                watch.steps.before(trainer, pl_module)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """With `read="step"`: the batch was seen whole; what other callbacks run from here on is none of it."""
        for watch in self.watches:
            if watch.steps is not None and pl_module.automatic_optimization:
                watch.steps.stop()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        """Probe when the step count has crossed a multiple of the interval."""
        for watch in self.watches:
            watch.after_batch(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Probe when the epoch count has crossed a multiple of the interval."""
        for watch in self.watches:
            watch.after_epoch(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Probe the trained model, write the report, and say what the run was."""
        for watch in self.watches:
            watch.end(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the record cleanly when training stops early, by Ctrl-C or by an error."""
        for watch in self.watches:
            watch.close(trainer)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as plain values; of several modules, by path too."""
        several = {watch.path: watch.state_dict() for watch in self.watches if watch.path is not None}
        return {**self.watches[0].state_dict(), **({"modules": several} if several else {})}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Find the state of a run that was set up otherwise: another interval, folder or default, the same run."""
        state = state_of_same_run(trainer, self, checkpoint)
        if state is not None:
            self.load_state_dict(state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue a run when training starts."""
        for watch in self.watches:
            # A module that was not watched before starts a record of its own.
            own = state_dict if watch.path is None else state_dict.get("modules", {}).get(watch.path)
            watch.load_state_dict(own)
