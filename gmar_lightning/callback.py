"""The Lightning callback: when to probe, which module, and whom to hand the result."""

from __future__ import annotations

import copy
import functools
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from gmar_lightning.arguments import (
    ConfigurationError,
    beside_primary,
    check_counts,
    check_display,
    check_faithfulness_every,
    check_fit,
    check_module,
    check_reactions,
    check_step_read,
    check_target,
    given_choice,
    given_probe,
    given_schedule,
)
from gmar_lightning.chosen import Choice
from gmar_lightning.explain.gmar import check_form
from gmar_lightning.explain.importance import Norm
from gmar_lightning.explain.output import Output
from gmar_lightning.explain.rollout import Rollout
from gmar_lightning.monitor.collapse import CollapseDetector
from gmar_lightning.monitor.probe import ProbeBatch
from gmar_lightning.monitor.probing import Prober
from gmar_lightning.monitor.record import ProbeRecord, Source
from gmar_lightning.monitor.say import SayOnce
from gmar_lightning.monitor.schedule import repeats
from gmar_lightning.monitor.settings import ProbeSettings, Target
from gmar_lightning.probe_taker import ProbeTaker
from gmar_lightning.recording import Reaction, Recording, Showing, Tolerance, described
from gmar_lightning.run_state import RunState, continuable
from gmar_lightning.show.dashboard import as_metrics
from gmar_lightning.step_watch import StepWatch, stop_watching
from gmar_lightning.trainer import (
    default_folder,
    is_smoke_test,
    log_position,
    state_of_same_run,
)


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
        module: Dotted path of the classifier inside the LightningModule; None calls its forward.
        target: "predicted", "label", a class index, or a callable on the output (`gmar_lightning.targets`).
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
        log_rollouts: Sequence[Rollout] = (),
        read: Source = "probe",
        output: Output | None = None,
    ) -> None:
        super().__init__()
        try:
            self._schedule = given_schedule(every_n_train_steps, every_n_epochs, read)
            check_form(norm, rollout, residual, micro_batch_size, output)
            self._given = given_probe(probe_batch)
            self._choice: Choice | None = given_choice(probe_images, probe_batch)
            beside = beside_primary(rollout, log_rollouts)
        except ValueError as error:
            raise ConfigurationError(str(error)) from None
        check_counts(num_images=num_images, num_heatmaps=num_heatmaps, max_events=max_events)
        check_faithfulness_every(faithfulness_every)
        check_reactions(on_error, on_collapse)
        check_step_read(read, target, probe_batch=probe_batch, probe_images=probe_images, residual=residual)
        self.read: Source = read
        check_target(target, self._given)
        self.num_images, self.module, self.target = num_images, module, target
        self.norm: Norm = norm
        self.rollout: Rollout = rollout
        self.on_collapse: Literal["warn", "alert", "stop"] | Callable[..., None] = on_collapse
        self.on_error: Literal["warn", "raise"] = on_error
        self.save_dir, self.verify, self._restored = save_dir, verify, None
        mean, std = check_display("mean", mean), check_display("std", std)
        self._showing = Showing(num_heatmaps, mean, std, class_names, log_per_head, max_events, beside)
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
            output=output,
        )
        self._begin_run()

    def _begin_run(self) -> None:
        self._schedule.reset()
        self._say = SayOnce(rank_zero_warn)
        fresh = copy.deepcopy(self._fresh_detector)
        self._prober = Prober(self._settings, detector=fresh, on_error=self.on_error, say=self._say)
        self._taker = ProbeTaker(self._prober, self._given, self._choice, self.verify, self._say)
        self._tolerance = Tolerance(self.on_error, self._say)
        self._reaction = Reaction(self.on_collapse)
        self._recording = Recording(self._tolerance)
        self._steps = StepWatch(self._schedule, self._prober) if self.read == "step" else None
        self._state = RunState()
        self._fit_started, self._trainer = time.monotonic(), 0

    @property
    def detector(self) -> CollapseDetector | None:
        """The detector of the current run."""
        return self._prober.detector

    @property
    def state_key(self) -> str:
        """Tells apart several callbacks in one trainer."""
        return self._generate_state_key(
            unit=self._schedule.unit,
            interval=self._schedule.interval if self._schedule.fixed else "auto",
            num_images=self.num_images,
            module=self.module,
            target=str(self.target) if callable(self.target) else self.target,
            norm=self.norm,
            rollout=self.rollout,
            **({"read": "step"} if self.read == "step" else {}),  # older checkpoints know no other
            save_dir=None if self.save_dir is None else str(self.save_dir),
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
            self._schedule.load_state_dict(restored["schedule"])
            self._prober.load_state_dict(restored["session"])
            self._state = RunState.from_checkpoint(restored)
        self._trainer, self._fit_started = id(trainer), time.monotonic()
        began, by_step = self._state.last_probe is None, self._schedule.unit == "step"
        if began:
            self._schedule.reset(trainer.global_step if by_step else trainer.current_epoch)
        if self._steps is not None:
            self._steps.begin(pl_module, self.module, first=began)
            self._open_record(trainer, pl_module, None, resumed=restored is not None)
        else:
            names, known = self._showing.class_names, self._state.indices
            probe, self._state.indices = self._taker.draw(trainer, pl_module, self.num_images, names, known)
            self._open_record(trainer, pl_module, probe, resumed=restored is not None)
            if began:
                self._run_probe(trainer, pl_module, log_position(trainer), first=True)
        self._schedule.begin(trainer.global_step, time.monotonic())

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        """With `read="step"`: watch the batch if its step may be due."""
        if self._steps is not None:
            self._steps.before(trainer, pl_module)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """With `read="step"`: the batch was seen whole; what other callbacks run from here on is none of it."""
        if self._steps is not None and pl_module.automatic_optimization:
            self._steps.stop()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        """Probe when the step count has crossed a multiple of the interval."""
        if self._steps is not None:
            record = self._steps.after(trainer)
            if record is not None:
                self._state.last_probe = (record.global_step, record.step)
                self._keep(trainer, pl_module, record)
        elif self._schedule.unit == "step" and self._schedule.due(trainer.global_step):
            self._run_probe(trainer, pl_module, log_position(trainer))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Probe when the epoch count has crossed a multiple of the interval."""
        if self._schedule.unit == "epoch" and self._schedule.due(trainer.current_epoch + 1):
            self._run_probe(trainer, pl_module, log_position(trainer, ended=True))
        elif self._schedule.unit == "step" and trainer.global_step == 0:
            self._say("GMARCallback: Lightning counted no optimizer step in an epoch; use every_n_epochs")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Probe the trained model, write the report, and say what the run was."""
        position, before = log_position(trainer, ended=True), self._state.last_probe
        if before is not None and before[0] != trainer.global_step:
            position = max(position, before[1] + 1)
        self._run_probe(trainer, pl_module, position, ended=True)
        self._close(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the record cleanly when training stops early, by Ctrl-C or by an error."""
        self._close(trainer)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as plain values."""
        return {
            **self._state.state_dict(),
            "schedule": self._schedule.state_dict(),
            "session": self._prober.state_dict(),
            "read": self.read,
        }

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Find the state of a run that was set up otherwise: another interval, folder or default, the same run."""
        state = state_of_same_run(trainer, self, checkpoint)
        if state is not None:
            self.load_state_dict(state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue a run when training starts."""
        self._restored = continuable(state_dict, self.read, self._say)

    def _open_record(
        self, trainer: Trainer, pl_module: LightningModule, probe: ProbeBatch | None, resumed: bool
    ) -> None:
        state, changed = self._state, self._state.has_other_images(probe, self._say)
        state.folder = str(self.save_dir or state.folder or default_folder(trainer, self))
        if self._recording.is_open and not changed:
            return
        on_disk = self.save_dir is not None or not is_smoke_test(trainer)
        self._recording = Recording.open(
            trainer,
            pl_module,
            probe,
            self._showing,
            folder=Path(state.folder) if on_disk else None,
            settings=described(self._settings, self._schedule, self.num_images, self.read),
            schedule=self._schedule,
            resumed=resumed or changed,
            say=self._say,
            tolerance=self._tolerance,
        )
        if probe is not None:
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
        over = self._taker.spent or (is_smoke_test(trainer) and not first)
        if over or repeats(self._state.last_probe, now):
            return
        stop_watching(trainer)  # another callback may read this very step, and the probe is none of it
        started, self._state.last_probe = time.monotonic(), now
        record = self._taker.take(trainer, pl_module, step, first, ended)
        self._keep(trainer, pl_module, record)
        took = time.monotonic() - started
        self._state.seconds += took
        if chosen := self._schedule.paid(trainer.global_step, took, started + took):
            rank_zero_info(f"GMARCallback: {chosen}")
            self._recording.plan(trainer, self._schedule)

    def _keep(self, trainer: Trainer, pl_module: LightningModule, record: ProbeRecord) -> None:
        if record.failure is None:
            trainer.callback_metrics.update(as_metrics(record))
        self._recording.add(record, trainer.print)
        react = functools.partial(self._reaction.to, trainer, pl_module, record.events, self._recording.alert)
        self._tolerance.run("on_collapse", react, record.step)

    def _close(self, trainer: Trainer) -> None:
        stop_watching(trainer)
        prober, seconds = self._prober, (self._state.seconds, time.monotonic() - self._fit_started)
        self._recording.close(trainer, (prober.taken, prober.failed), seconds)
