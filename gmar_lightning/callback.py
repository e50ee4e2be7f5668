"""The Lightning callback: when to probe, which module, and whom to hand the result."""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn

from gmar_lightning.arguments import (
    ConfigurationError,
    check_choice,
    check_counts,
    check_display,
    check_faithfulness_every,
    check_fit,
    check_module,
    check_target,
    given_choice,
    given_probe,
)
from gmar_lightning.chosen import Choice, chosen_probe, indices_of
from gmar_lightning.explain.gmar import check_form
from gmar_lightning.explain.importance import Norm
from gmar_lightning.explain.rollout import Rollout
from gmar_lightning.monitor.collapse import CollapseDetector
from gmar_lightning.monitor.probe import ProbeBatch
from gmar_lightning.monitor.probing import Moment, Prober
from gmar_lightning.monitor.say import SayOnce
from gmar_lightning.monitor.schedule import Every, repeats
from gmar_lightning.monitor.selftest import SelfTest
from gmar_lightning.monitor.settings import ProbeSettings, Target
from gmar_lightning.recording import Reaction, Recording, Showing, Tolerance, described
from gmar_lightning.show.dashboard import as_metrics
from gmar_lightning.trainer import (
    default_folder,
    draw_images,
    ends_here,
    is_smoke_test,
    log_position,
    logged_metrics,
    model_and_state,
    silenced,
    state_of_same_run,
)


class GMARCallback(Callback):
    """Watch a Vision Transformer while it trains: heatmaps, head importance, heads that collapse.

    A fixed, class-balanced batch of validation images is explained before the first optimizer step, at every
    interval and at the end. Training is not disturbed: with and without the callback, the final weights are
    bit-identical.

    What is logged, on the x-axis of Lightning's own training rows, is the table of `show.keys`; its numbers are in
    `trainer.callback_metrics` too, for other callbacks to monitor.

    Args:
        every_n_train_steps: Probe after each so many optimizer steps; 100 when neither interval is given.
        every_n_epochs: Probe after each so many epochs, instead.
        num_images: Probe size, drawn class-balanced from the validation set, fixed for the run.
        num_heatmaps: How many of them are drawn.
        probe_batch: Your own `(images, labels)`, or a mapping with `images` and optionally `labels`.
        probe_images: Instead of a class-balanced draw: a folder (classes are the names of its folders), indices of
            the validation set, "hardest" or "misclassified" (among 256 images, before the first step).
        module: Dotted path of the classifier inside the LightningModule; None calls its forward.
        target: "predicted", "label", a class index, or a callable on the output (`gmar_lightning.targets`).
        norm: "l1", "l2" or "uniform", see `gmar`.
        rollout: "gradient", "paper", "flow", "rollout" or "last_layer", see `gmar`.
        residual: Weight of the residual path, 1 when None.
        micro_batch_size: Images per forward; None takes the whole probe at once.
        detector: The collapse detector; None switches it off.
        on_collapse: What to do when heads collapse: "warn", "alert" (W&B alert too), "stop" (graceful), or a
            callable `(trainer, pl_module, events)`, called on every process.
        confirm: Measure by ablation what newly flagged heads still contribute: five forwards over the probe
            images, and four with their backwards, at probes that flag, none at others.
        faithfulness_every: When four maps are tested (`show.keys`; about 29 forwards, and two with their backwards,
            per image): "ends" at the first and the last probe, a number after each so many more, None never.
        on_error: "warn" lets training go on after a failed probe, "raise" does not.
        mean: Channel means for display; found where possible, as `std` and `class_names`.
        std: Channel standard deviations for display.
        class_names: For captions.
        log_per_head: One scalar per head, hidden from automatic panels.
        max_events: Pictures of at most so many probes are logged; scalars always are.
        save_dir: Local record; `<trainer log dir>/gmar` when None.
        verify: Whether the first probe also copies the weights, to see whether the forward writes them.

    Raises:
        ConfigurationError: For arguments that do not fit, with what to change.
    """

    def __init__(
        self,
        every_n_train_steps: int | None = None,
        every_n_epochs: int | None = None,
        num_images: int = 32,
        num_heatmaps: int = 8,
        probe_batch: Any = None,
        module: str | None = None,
        target: Target = "predicted",
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
    ) -> None:
        super().__init__()
        steps = 100 if every_n_train_steps is None and every_n_epochs is None else every_n_train_steps
        try:
            self._schedule = Every(steps=steps, epochs=every_n_epochs)
            check_form(norm, rollout, residual, micro_batch_size)
            self._given = given_probe(probe_batch)
            self._choice: Choice | None = given_choice(probe_images, probe_batch)
        except ValueError as error:
            raise ConfigurationError(str(error)) from None
        check_counts(num_images=num_images, num_heatmaps=num_heatmaps, max_events=max_events)
        check_faithfulness_every(faithfulness_every)
        check_choice("on_error", on_error, ("warn", "raise"))
        if not callable(on_collapse):
            check_choice("on_collapse", on_collapse, ("warn", "alert", "stop"), "or a callable")
        check_target(target, self._given)
        self.num_images, self.module, self.target = num_images, module, target
        self.norm, self.rollout = norm, rollout
        self.on_collapse: Literal["warn", "alert", "stop"] | Callable[..., None] = on_collapse
        self.on_error: Literal["warn", "raise"] = on_error
        self.save_dir, self.verify = None if save_dir is None else str(save_dir), verify
        self._restored = None
        mean, std = check_display("mean", mean), check_display("std", std)
        self._showing = Showing(num_heatmaps, mean, std, class_names, log_per_head, max_events)
        self._fresh_detector = CollapseDetector() if detector == "default" else detector
        self._settings = ProbeSettings(
            target=target,
            norm=norm,
            rollout=rollout,
            residual=residual,
            module=module,
            micro_batch_size=micro_batch_size,
            confirm=confirm,
            faithfulness_every=faithfulness_every,
            drawn=num_heatmaps,
        )
        self._begin_run()

    def _begin_run(self) -> None:
        self._schedule.reset()
        self._say = SayOnce(rank_zero_warn)
        self._selftest = SelfTest(self.verify, self._say)
        fresh = copy.deepcopy(self._fresh_detector)
        self._prober = Prober(self._settings, detector=fresh, on_error=self.on_error, say=self._say)
        self._tolerance = Tolerance(self.on_error, self._say)
        self._reaction = Reaction(self.on_collapse, self._tolerance)
        self._recording = Recording(self._tolerance)
        self._last_probe: tuple[int, int] | None = None  # (optimizer steps, logger's x)
        self._probe_seconds, self._fit_started, self._trainer = 0.0, time.monotonic(), 0
        self._folder: str | None = None
        self._fingerprint: str | None = None
        self._indices: list[int] | None = None

    @property
    def detector(self) -> CollapseDetector | None:
        """The detector of the current run."""
        return self._prober.detector

    @property
    def state_key(self) -> str:
        """Tells apart several callbacks in one trainer."""
        return self._generate_state_key(
            unit=self._schedule.unit,
            interval=self._schedule.interval,
            num_images=self.num_images,
            module=self.module,
            target=str(self.target) if callable(self.target) else self.target,
            norm=self.norm,
            rollout=self.rollout,
            save_dir=self.save_dir,
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work before anything is loaded."""
        if stage == "fit":
            check_fit(trainer, pl_module, self.module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the probe images, open or continue the record, and probe the untrained model."""
        check_module(pl_module, self.module)
        restored, self._restored = self._restored, None
        if restored is not None or trainer.global_step == 0 or self._trainer != id(trainer):
            self._begin_run()
        if restored is not None:
            self._continue_from(restored)
        self._trainer, self._fit_started = id(trainer), time.monotonic()
        context = trainer.precision_plugin.forward_context  # of this trainer, one of several perhaps
        self._prober.settings = dataclasses.replace(self._prober.settings, precision=context)
        given = self._given
        if self._choice is not None:
            names, which = self._showing.class_names, self._indices or self._choice
            given = chosen_probe(trainer, pl_module, which, self.num_images, self.module, names, self._say)
            self._indices = indices_of(self._choice, given)
        target = "predicted" if callable(self.target) else self.target
        probe = draw_images(
            trainer, pl_module, given, num_images=self.num_images, target=target, say=self._say
        )
        self._open_record(trainer, pl_module, probe, resumed=restored is not None)
        if self._last_probe is None:
            started_at = trainer.global_step if self._schedule.unit == "step" else trainer.current_epoch
            self._schedule.reset(started_at)
            self._run_probe(trainer, pl_module, log_position(trainer), first=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Probe when the step count has crossed a multiple of the interval."""
        if self._schedule.unit == "step" and self._schedule.due(trainer.global_step):
            self._run_probe(trainer, pl_module, log_position(trainer))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Probe when the epoch count has crossed a multiple of the interval."""
        if self._schedule.unit == "epoch" and self._schedule.due(trainer.current_epoch + 1):
            self._run_probe(trainer, pl_module, log_position(trainer, ended=True))
        elif self._schedule.unit == "step" and trainer.global_step == 0:
            self._say(
                "GMARCallback: an epoch went by and Lightning counted no optimizer step; use every_n_epochs"
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Probe the trained model, write the report, and say what the run was."""
        position = log_position(trainer, ended=True)
        if self._last_probe is not None and self._last_probe[0] != trainer.global_step:
            position = max(position, self._last_probe[1] + 1)
        self._run_probe(trainer, pl_module, position, ended=True)
        self._close(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the record cleanly when training stops early, by Ctrl-C or by an error."""
        self._close(trainer)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as plain values."""
        return {
            "schedule": self._schedule.state_dict(),
            "last_probe": list(self._last_probe or ()),
            "session": self._prober.state_dict(),
            "selftest": self._selftest.state_dict(),
            "fingerprint": self._fingerprint,
            "folder": self._recording.folder or self._folder,
            "save_dir": self.save_dir,
            "probe_images": self._indices,
            "probe_seconds": self._probe_seconds,
        }

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Find the state of a run that was set up otherwise: another interval, folder or default, the same run."""
        state = state_of_same_run(trainer, self, checkpoint)
        if state is not None:
            self.load_state_dict(state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue a run when training starts; tuners restore states from before the first probe: nothing to do."""
        self._restored = dict(state_dict) if state_dict["last_probe"] else None

    def _continue_from(self, state: Mapping[str, Any]) -> None:
        self._schedule.load_state_dict(state["schedule"])
        self._last_probe = (state["last_probe"][0], state["last_probe"][1])
        self._prober.load_state_dict(state["session"])
        self._fingerprint = state["fingerprint"]
        self._folder = state["folder"] if state.get("save_dir") == self.save_dir else None
        self._indices, self._probe_seconds = state.get("probe_images"), state["probe_seconds"]
        self._selftest.load_state_dict(state.get("selftest", self._selftest.state_dict()))

    def _open_record(
        self, trainer: Trainer, pl_module: LightningModule, probe: ProbeBatch, resumed: bool
    ) -> None:
        changed = self._fingerprint is not None and self._fingerprint != probe.fingerprint
        if changed:
            self._say(
                "GMARCallback: the validation set gives other probe images than before; the record starts a new "
                "segment"
            )
        self._fingerprint = probe.fingerprint
        self._folder = str(self._folder or self.save_dir or default_folder(trainer, self))
        if self._prober.probe is not None and not changed:
            return
        self._recording = Recording.open(
            trainer,
            pl_module,
            probe,
            self._showing,
            folder=Path(self._folder) if self.save_dir is not None or not is_smoke_test(trainer) else None,
            settings=described(self._settings, self._schedule, self.num_images),
            schedule=self._schedule,
            resumed=resumed or changed,
            say=self._say,
            tolerance=self._tolerance,
        )
        self._prober.begin(probe, *self._recording.seam(self.rollout))

    def _run_probe(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        step: int,
        first: bool = False,
        ended: bool = False,
    ) -> None:
        now = (trainer.global_step, step)
        spent = self._prober.spent or self._selftest.mode == "refused"
        over = self._prober.probe is None or spent or (is_smoke_test(trainer) and not first)
        if over or repeats(self._last_probe, now):
            return
        started, self._last_probe = time.monotonic(), now
        last = ended or ends_here(trainer)
        moment = Moment(step, now[0], trainer.current_epoch, logged_metrics(trainer), last)
        with silenced(trainer, pl_module):
            take = functools.partial(self._prober.take, moment=moment, first=first)
            record = self._selftest.take(take, *model_and_state(trainer, pl_module))
        if record is None:
            return
        if record.failure is None:
            trainer.callback_metrics.update(as_metrics(record))
        self._recording.add(record)
        self._reaction.to(trainer, pl_module, record, self._recording.alert)
        self._probe_seconds += time.monotonic() - started

    def _close(self, trainer: Trainer) -> None:
        prober, seconds = self._prober, (self._probe_seconds, time.monotonic() - self._fit_started)
        self._recording.close(trainer, (prober.taken, prober.failed), seconds)
