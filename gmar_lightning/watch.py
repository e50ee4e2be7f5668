"""One module under watch: its probe images, its probes, its record. The callback says when."""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn

from gmar_lightning.arguments import check_forward, check_module, named_in_error
from gmar_lightning.chosen import Choice, chosen_probe, indices_of
from gmar_lightning.explain.errors import UnsupportedModelError
from gmar_lightning.monitor.collapse import CollapseDetector
from gmar_lightning.monitor.probe import ProbeBatch
from gmar_lightning.monitor.probing import Moment, Prober
from gmar_lightning.monitor.say import SayOnce
from gmar_lightning.monitor.schedule import Every, repeats
from gmar_lightning.monitor.selftest import SelfTest
from gmar_lightning.monitor.settings import ProbeSettings
from gmar_lightning.recording import Reaction, Recording, Showing, Tolerance, described
from gmar_lightning.show import keys
from gmar_lightning.show.dashboard import as_metrics
from gmar_lightning.trainer import (
    callable_model,
    default_folder,
    draw_images,
    ends_here,
    is_smoke_test,
    log_position,
    logged_metrics,
    not_state,
    silenced,
    state_of_run,
)


@dataclass(frozen=True)
class Plan:
    """What the callback was asked for, the same for every module under watch.

    Attributes:
        schedule: How often probes are due.
        num_images: Probe size.
        choice: What `probe_images` asks for, or None.
        showing: How the run is shown.
        detector: A fresh one, copied for each run; None for no judgement.
        on_collapse: As for the callback; so are the others.
        on_error: "warn" or "raise".
        save_dir: Local record, or None.
        verify: Whether the first probe also copies the weights.
    """

    schedule: Every
    num_images: int
    choice: Choice | None
    showing: Showing
    detector: CollapseDetector | None
    on_collapse: Literal["warn", "alert", "stop"] | Callable[..., None]
    on_error: Literal["warn", "raise"]
    save_dir: str | os.PathLike[str] | None
    verify: bool


class Watch:
    """The probes of one module, from the first to the last of a run.

    Args:
        plan: What the callback was asked for.
        settings: What is asked of this module.
        given: The user's own probe images, or None.
        path: Its part of every logged name, of the record's folder and of what is said, where several modules are
            watched; None for a single one.
    """

    def __init__(
        self, plan: Plan, settings: ProbeSettings, given: ProbeBatch | None, path: str | None = None
    ) -> None:
        self.plan, self.settings, self.given, self.path = plan, settings, given, path
        self.reset()

    def reset(self) -> None:
        """Forget the run."""
        self.say = SayOnce(functools.partial(_warn, self.path))
        self.selftest = SelfTest(self.plan.verify, self.say)
        fresh = copy.deepcopy(self.plan.detector)
        self.prober = Prober(self.settings, detector=fresh, on_error=self.plan.on_error, say=self.say)
        self.tolerance = Tolerance(self.plan.on_error, self.say)
        self.reaction = Reaction(self.plan.on_collapse, self.path)
        self.recording = Recording(self.tolerance)
        self.last_probe: tuple[int, int] | None = None  # (optimizer steps, logger's x)
        self.started, self.seconds = time.monotonic(), 0.0
        self.folder: str | None = None
        self.fingerprint: str | None = None
        self.indices: list[int] | None = None

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as plain values."""
        return {
            "last_probe": list(self.last_probe or ()),
            "session": self.prober.state_dict(),
            "fingerprint": self.fingerprint,
            "folder": self.folder,
            "probe_images": self.indices,
            "probe_seconds": self.seconds,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        if not state["last_probe"]:
            return
        self.last_probe = (state["last_probe"][0], state["last_probe"][1])
        self.prober.load_state_dict(state["session"])
        self.fingerprint, self.folder = state["fingerprint"], state["folder"]
        self.indices = state.get("probe_images")  # missing in older checkpoints
        self.seconds = state["probe_seconds"]

    def begin(self, trainer: Trainer, pl_module: LightningModule, callback: Callback, resumed: bool) -> None:
        """Draw the probe images, and open or continue the record."""
        self.started = time.monotonic()
        check_module(pl_module, self.settings.module)
        context = trainer.precision_plugin.forward_context  # of this trainer, one of several perhaps
        self.prober.settings = dataclasses.replace(self.prober.settings, precision=context)
        probe = self._images(trainer, pl_module)
        check_forward(pl_module, self.settings, probe)
        changed = self.fingerprint is not None and self.fingerprint != probe.fingerprint
        if changed:
            self.say(
                "GMARCallback: the validation set gives other probe images than before; the record starts a new "
                "segment"
            )
        self.fingerprint = probe.fingerprint
        folder = self.folder or self.plan.save_dir or default_folder(trainer, callback)
        if self.folder is None or self.plan.save_dir is not None:
            folder = Path(self.plan.save_dir or folder, self.path or "")
        self.folder = str(folder)
        if self.prober.probe is not None and not changed:
            return
        on_disk = self.plan.save_dir is not None or not is_smoke_test(trainer)
        self.recording = Recording.open(
            trainer,
            pl_module,
            probe,
            self.plan.showing,
            folder=Path(self.folder) if on_disk else None,
            settings=described(self.settings, self.plan.schedule, self.plan.num_images),
            schedule=self.plan.schedule,
            resumed=resumed or changed,
            say=self.say,
            tolerance=self.tolerance,
            path=self.path,
        )
        self.prober.begin(probe, *self.recording.seam(self.settings.rollout))

    def _images(self, trainer: Trainer, pl_module: LightningModule) -> ProbeBatch:
        plan, inputs, given = self.plan, self.settings.inputs, self.given
        if plan.choice is not None:
            names, which = plan.showing.class_names, self.indices or plan.choice
            module = self.settings.module
            given = chosen_probe(trainer, pl_module, which, plan.num_images, module, names, self.say, inputs)
            self.indices = indices_of(plan.choice, given)
        target = "predicted" if callable(self.settings.target) else self.settings.target
        return draw_images(
            trainer,
            pl_module,
            given,
            num_images=plan.num_images,
            target=target,
            say=self.say,
            inputs=inputs,
        )

    def probe(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        step: int,
        first: bool = False,
        ended: bool = False,
    ) -> None:
        """Take a probe, store and show it, and react to what it found.

        Args:
            trainer: The trainer.
            pl_module: The LightningModule.
            step: The logger's x.
            first: Whether it is the first of the run, at which a model that cannot be explained is refused.
            ended: Whether training is over.
        """
        now = (trainer.global_step, step)
        spent = self.prober.spent or self.selftest.mode == "refused"
        over = self.prober.probe is None or spent or (is_smoke_test(trainer) and not first)
        if over or repeats(self.last_probe, now):
            return
        started, self.last_probe = time.monotonic(), now
        last = ended or ends_here(trainer)
        moment = Moment(step, now[0], trainer.current_epoch, logged_metrics(trainer), last)
        try:
            with silenced(trainer, pl_module):
                record = self.selftest.take(
                    lambda model: self.prober.take(model, moment, first),
                    callable_model(trainer, pl_module),
                    state_of_run(trainer, pl_module),
                    not_state(trainer),
                )
        except UnsupportedModelError as error:
            raise named_in_error(error, self.path) from error
        if record.failure is None:
            numbers = as_metrics(record).items()
            trainer.callback_metrics.update({keys.under(self.path, name): value for name, value in numbers})
        self.recording.add(record)
        react = functools.partial(self.reaction.to, trainer, pl_module, record.events, self.recording.alert)
        self.tolerance.run("on_collapse", react, record.step)
        self.seconds += time.monotonic() - started

    def end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Probe the trained model, write the report, and say what the run was."""
        position = log_position(trainer, ended=True)
        if self.last_probe is not None and self.last_probe[0] != trainer.global_step:
            position = max(position, self.last_probe[1] + 1)
        self.probe(trainer, pl_module, position, ended=True)
        self.close(trainer)

    def close(self, trainer: Trainer) -> None:
        """Write the report, once, and say what the run was."""
        counts, seconds = (
            (self.prober.taken, self.prober.failed),
            (self.seconds, time.monotonic() - self.started),
        )
        self.recording.close(trainer, counts, seconds)


def _warn(path: str | None, sentence: str) -> None:
    caller = "GMARCallback:" if path is None else f"GMARCallback, {path}:"
    rank_zero_warn(sentence.replace("GMARCallback:", caller, 1))
