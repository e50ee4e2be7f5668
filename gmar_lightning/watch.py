"""One module under watch: its probe images, its probes, its record. The callback says which."""

from __future__ import annotations

import copy
import functools
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from gmar_lightning.arguments import check_forward, check_module, named_in_error
from gmar_lightning.chosen import Choice
from gmar_lightning.explain.errors import UnsupportedModelError
from gmar_lightning.monitor.collapse import CollapseDetector
from gmar_lightning.monitor.probe import ProbeBatch
from gmar_lightning.monitor.probing import Prober
from gmar_lightning.monitor.record import ProbeRecord, Source
from gmar_lightning.monitor.say import SayOnce
from gmar_lightning.monitor.schedule import Adaptive, Every, repeats
from gmar_lightning.monitor.settings import ProbeSettings
from gmar_lightning.probe_taker import ProbeTaker
from gmar_lightning.reaction import Reaction
from gmar_lightning.recording import Recording, Showing, Tolerance, described
from gmar_lightning.run_state import RunState, continuable
from gmar_lightning.show import keys
from gmar_lightning.show.dashboard import as_metrics
from gmar_lightning.step_watch import StepWatch, stop_watching
from gmar_lightning.trainer import default_folder, is_smoke_test, log_position


@dataclass(frozen=True)
class Plan:
    """What the callback was asked for, the same for every module under watch.

    Attributes:
        num_images: Probe size.
        choice: What `probe_images` asks for, or None.
        showing: How the run is shown.
        detector: A fresh one, copied for each run; None for no judgement.
        on_collapse: As for the callback; so are the others.
        on_error: "warn" or "raise".
        save_dir: Local record, or None.
        verify: Whether the first probe also copies the weights.
        read: "probe" or "step".
    """

    num_images: int
    choice: Choice | None
    showing: Showing
    detector: CollapseDetector | None
    on_collapse: Literal["warn", "alert", "stop"] | Callable[..., None]
    on_error: Literal["warn", "raise"]
    save_dir: str | os.PathLike[str] | None
    verify: bool
    read: Source


class Watch:
    """The probes of one module, from the first to the last of a run.

    Args:
        plan: What the callback was asked for.
        settings: What is asked of this module.
        schedule: How often probes are due.
        given: The user's own probe images, or None.
        path: Its part of every logged name, of the record's folder and of what is said, where several modules are
            watched; None for a single one.

    Attributes:
        prober: Explains and judges.
        steps: Reads training steps, with `read="step"`; None for probes.
        recording: Stores and shows.
    """

    def __init__(
        self,
        plan: Plan,
        settings: ProbeSettings,
        schedule: Every | Adaptive,
        given: ProbeBatch | None,
        path: str | None = None,
    ) -> None:
        self.plan, self.settings, self.schedule, self.given, self.path = plan, settings, schedule, given, path
        self._restored: dict[str, Any] | None = None
        self._begin_run()

    def _begin_run(self) -> None:
        plan = self.plan
        self.schedule.reset()
        self.say = SayOnce(functools.partial(_warn, self.path))
        fresh = copy.deepcopy(plan.detector)
        self.prober = Prober(self.settings, detector=fresh, on_error=plan.on_error, say=self.say)
        self._taker = ProbeTaker(self.prober, self.given, plan.choice, plan.verify, self.say)
        self._tolerance = Tolerance(plan.on_error, self.say)
        self._reaction = Reaction(plan.on_collapse, self._tolerance, self.path)
        self.recording = Recording(self._tolerance)
        self.steps = StepWatch(self.schedule, self.prober) if plan.read == "step" else None
        self._state = RunState(asked=None if plan.save_dir is None else str(plan.save_dir))
        self._fit_started, self._trainer = time.monotonic(), 0

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as plain values."""
        return {
            **self._state.state_dict(),
            "schedule": self.schedule.state_dict(),
            **self._taker.state_dict(),
            "read": self.plan.read,
        }

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Continue a run when training starts."""
        self._restored = None if state is None else continuable(state, self.plan.read, self.say)

    def begin(self, trainer: Trainer, pl_module: LightningModule, callback: Callback) -> None:
        """Draw the probe images, open or continue the record, and probe the untrained model."""
        check_module(pl_module, self.settings.module)
        restored, self._restored = self._restored, None
        if restored is not None or trainer.global_step == 0 or self._trainer != id(trainer):
            self._begin_run()
        if restored is not None:
            self.schedule.load_state_dict(restored["schedule"])
            self._taker.load_state_dict(restored)
            self._state = RunState.from_checkpoint(restored, self._state.asked)
        self._trainer, self._fit_started = id(trainer), time.monotonic()
        began, by_step = self._state.last_probe is None, self.schedule.unit == "step"
        if began:
            self.schedule.reset(trainer.global_step if by_step else trainer.current_epoch)
        if self.steps is not None:
            check_forward(pl_module, self.settings, None)
            self.steps.begin(pl_module, self.settings.module, first=began)
            self._open_record(trainer, pl_module, callback, None, resumed=restored is not None)
        else:
            names, known = self.plan.showing.class_names, self._state.indices
            probe, self._state.indices = self._taker.draw(
                trainer, pl_module, self.plan.num_images, names, known
            )
            check_forward(pl_module, self.settings, probe)
            self._open_record(trainer, pl_module, callback, probe, resumed=restored is not None)
            if began:
                self._run_probe(trainer, pl_module, log_position(trainer), first=True)
        self.schedule.begin(trainer.global_step, time.monotonic())

    def after_batch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Probe when the step count has crossed a multiple of the interval."""
        if self.steps is not None:
            record = self.steps.after(trainer)
            if record is not None:
                self._state.last_probe = (record.global_step, record.step)
                self._keep(trainer, pl_module, record)
        elif self.schedule.unit == "step" and self.schedule.due(trainer.global_step):
            self._run_probe(trainer, pl_module, log_position(trainer))

    def after_epoch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Probe when the epoch count has crossed a multiple of the interval."""
        if self.schedule.unit == "epoch" and self.schedule.due(trainer.current_epoch + 1):
            self._run_probe(trainer, pl_module, log_position(trainer, ended=True))
        elif self.schedule.unit == "step" and trainer.global_step == 0:
            self.say("GMARCallback: in a whole epoch Lightning counted no optimizer step; use every_n_epochs")

    def end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Probe the trained model, write the report, and say what the run was."""
        position, before = log_position(trainer, ended=True), self._state.last_probe
        if before is not None and before[0] != trainer.global_step:
            position = max(position, before[1] + 1)
        self._run_probe(trainer, pl_module, position, ended=True)
        self.close(trainer)

    def _open_record(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        callback: Callback,
        probe: ProbeBatch | None,
        resumed: bool,
    ) -> None:
        state, changed = self._state, self._state.has_other_images(probe, self.say)
        if state.folder is None:
            state.folder = str(Path(self.plan.save_dir or default_folder(trainer, callback), self.path or ""))
        if self.recording.is_open and not changed:
            return
        on_disk = self.plan.save_dir is not None or not is_smoke_test(trainer)
        self.recording = Recording.open(
            trainer,
            pl_module,
            probe,
            self.plan.showing,
            folder=Path(state.folder) if on_disk else None,
            settings=described(self.settings, self.schedule, self.plan.num_images, self.plan.read),
            schedule=self.schedule,
            resumed=resumed or changed,
            say=self.say,
            tolerance=self._tolerance,
            path=self.path,
        )
        state.folder = self.recording.folder or state.folder
        if probe is not None:
            self.prober.begin(probe, *self.recording.seam(self.settings.rollout))

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
        try:
            record = self._taker.take(trainer, pl_module, step, first, ended)
        except UnsupportedModelError as error:
            raise named_in_error(error, self.path) from error
        self._keep(trainer, pl_module, record)
        took = time.monotonic() - started
        self._state.seconds += took
        if chosen := self.schedule.paid(trainer.global_step, took, started + took):
            rank_zero_info(f"GMARCallback: {chosen}")
            self.recording.plan(trainer, self.schedule)

    def _keep(self, trainer: Trainer, pl_module: LightningModule, record: ProbeRecord | None) -> None:
        if record is None:
            return
        if record.failure is None:
            numbers = as_metrics(record).items()
            trainer.callback_metrics.update({keys.under(self.path, name): value for name, value in numbers})
        self.recording.add(record, trainer.print)
        self._reaction.to(trainer, pl_module, record, self.recording.alert)

    def close(self, trainer: Trainer) -> None:
        """Write the report, once, and say what the run was."""
        stop_watching(trainer)
        prober, seconds = self.prober, (self._state.seconds, time.monotonic() - self._fit_started)
        self.recording.close(trainer, (prober.taken, prober.failed), seconds)


def _warn(path: str | None, sentence: str) -> None:
    caller = "GMARCallback:" if path is None else f"GMARCallback, {path}:"
    rank_zero_warn(sentence.replace("GMARCallback:", caller, 1))
