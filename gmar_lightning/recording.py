"""What becomes of a run's probes on process zero: stored, shown, and acted upon."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from gmar_lightning.monitor.attention_kinds import RULES
from gmar_lightning.monitor.drift import DriftTracker
from gmar_lightning.monitor.events import HeadEvent
from gmar_lightning.monitor.history import History
from gmar_lightning.monitor.probe import ProbeBatch
from gmar_lightning.monitor.processes import of_first_process
from gmar_lightning.monitor.record import ProbeRecord, Source
from gmar_lightning.monitor.say import SayOnce
from gmar_lightning.monitor.schedule import Every
from gmar_lightning.monitor.settings import ProbeSettings
from gmar_lightning.show.console import alarm_text, opening_line
from gmar_lightning.show.publisher import Display, Publisher
from gmar_lightning.trainer import class_names_of, logged_metrics, photographs, planned_probes
from gmar_lightning.version import __version__

# What is worth stopping for, and what is worth a word: attention can degenerate in a model that still learns.
_ALARMS = ("collapsed", "layer_vanishing", "nonfinite")
_WARNINGS = tuple(rule.kind for rule in RULES)


class Tolerance:
    """What happens to an error that is not the training's: said once, or raised.

    Args:
        on_error: "raise" raises it, "warn" says it.
        say: Says a sentence on the console, once.
    """

    def __init__(self, on_error: Literal["warn", "raise"], say: SayOnce) -> None:
        self._raises, self._say = on_error == "raise", say

    def run(self, what: str, action: Callable[[], object], step: int) -> None:
        """Do it; `what` names it, where it fails.

        Raises:
            Exception: What went wrong, with `on_error="raise"`; but never that a disk is full or gone, which
                is no mistake of the run.
        """
        try:
            action()
        except Exception as error:
            if self._raises and not isinstance(error, OSError):
                raise
            self._say(
                f"GMARCallback: {what} failed at step {step}, training goes on ({type(error).__name__}: {error})",
                what,
            )


@dataclass(frozen=True)
class Showing:
    """The callback's arguments that say how a run is shown.

    Attributes:
        num_heatmaps: How many of the probe images are drawn.
        mean: Channel means for display, or None.
        std: Channel standard deviations, or None.
        class_names: For captions, or None.
        per_head: Whether every head gets a number.
        max_events: Pictures of at most so many probes.
        rollouts: Forms of the map that loggers get beside the primary one.
    """

    num_heatmaps: int
    mean: Sequence[float] | None
    std: Sequence[float] | None
    class_names: Sequence[str] | None
    per_head: bool
    max_events: int
    rollouts: Sequence[str] = ()


class Recording:
    """The record and the display of one run; on all processes but the first there is neither.

    Args:
        tolerance: What happens where storing or showing fails.
        history: The record, on the first process.
        publisher: What shows it, likewise.
        opened: Whether a run has begun; not before `open`.
    """

    def __init__(
        self,
        tolerance: Tolerance,
        history: History | None = None,
        publisher: Publisher | None = None,
        opened: bool = False,
    ) -> None:
        self._tolerance, self._closed, self._open = tolerance, False, opened
        self.history, self.publisher = history, publisher

    @classmethod
    def open(
        cls,
        trainer: Trainer,
        pl_module: LightningModule,
        probe: ProbeBatch | None,
        showing: Showing,
        *,
        folder: Path | None,
        settings: Mapping[str, Any],
        schedule: Every,
        resumed: bool,
        say: SayOnce,
        tolerance: Tolerance,
    ) -> Recording:
        """Start or continue the record, in memory alone where the folder cannot be used; save the photographs.

        Args:
            trainer: Its loggers are published to.
            pl_module: Asked for class names, mean and standard deviation where there are none.
            probe: The probe images; None where steps are read.
            showing: How the run is shown.
            folder: Where; None keeps the record in memory.
            settings: What the record says of the callback's settings.
            schedule: How often a probe is due, from which follows how many there will be.
            resumed: Whether a record in the folder is continued.
            say: Says a sentence on the console, once.
            tolerance: What happens where storing or showing fails.
        """
        if not trainer.is_global_zero:
            return cls(tolerance, opened=True)
        if not trainer.loggers and folder is not None:
            rank_zero_info(f"GMARCallback: no logger; the record goes to {folder}")
        names = showing.class_names or class_names_of(trainer, pl_module)
        run = {
            "version": __version__,
            "class_names": None if names is None else list(names),
            "settings": dict(settings),
            **(_OF_STEPS if probe is None else _of_images(probe, showing.num_heatmaps)),
        }
        try:
            history = History.open(folder, run, trainer.global_step if resumed else None)
        except (OSError, ValueError) as error:
            say(f"GMARCallback: no record can be written to {folder} ({error}); the run goes on without it")
            history = History.open(None, run)
        pictures: list[Any] = []
        if probe is not None:
            images = probe.images[: showing.num_heatmaps]
            pictures = photographs(trainer, pl_module, images, showing.mean, showing.std, say, probe.masks)
            tolerance.run("the record", lambda: history.save_inputs(pictures), trainer.global_step)
        display = Display(
            images=pictures,
            labels=history.segment_run(history.segment).get("labels"),
            names=history.run.get("class_names"),
            image_names=None if probe is None else probe.names,
            per_head=showing.per_head,
            most_media=showing.max_events,
            rollouts=showing.rollouts,
        )
        recording = cls(tolerance, history, Publisher(history, trainer.loggers, display, say), opened=True)
        recording.plan(trainer, schedule)
        return recording

    def plan(self, trainer: Trainer, schedule: Every) -> None:
        """Spread the pictures over the probes that are to come, as far as their number can be known."""
        if self.publisher is not None:
            self.publisher.plan(planned_probes(trainer, schedule.unit, schedule.interval))

    @property
    def is_open(self) -> bool:
        """Whether a run has begun to be recorded here; the same on every process."""
        return self._open

    def seam(self, form: str) -> tuple[int, DriftTracker]:
        """Where the probes to come begin: their segment, and the maps that earlier ones of it had.

        Every process tells how far maps have moved, so all of them get what the first one reads.
        """
        ends = of_first_process(None if self.history is None else self.history.ends_of_segment(form))
        segment, first, last = (0, None, None) if ends is None else ends
        return segment, DriftTracker(first, last)

    def add(self, record: ProbeRecord, show: Callable[[str], None]) -> None:
        """Store a probe and show it; of the first one, `show` prints what was seen of the model."""
        self._closed = False  # a second `fit` of the same trainer goes on with the record
        history, publisher = self.history, self.publisher
        if history is not None:
            self._tolerance.run("the record", lambda: history.append(record), record.step)
            if record.classes:
                show(opening_line(history.run))
        if publisher is not None:
            self._tolerance.run("the display", lambda: publisher.show(record), record.step)

    def alert(self, title: str, text: str) -> None:
        """Send one alert to every logger that knows alerts."""
        if self.publisher is not None:
            self.publisher.alert(title, text)

    def close(self, trainer: Trainer, counts: tuple[int, int], seconds: tuple[float, float]) -> None:
        """Write the report, once, and say what the run was.

        Args:
            trainer: Prints, and says what was logged last.
            counts: Probes taken, and failed among them.
            seconds: Time spent in probes, and in the whole fit.
        """
        publisher = self.publisher
        if self._closed or publisher is None or not publisher.history.records:
            return
        self._closed = True

        def sum_up() -> None:
            lines = publisher.close(metrics=logged_metrics(trainer), counts=counts, seconds=seconds)
            trainer.print("\n".join(lines))

        self._tolerance.run("the summary", sum_up, trainer.global_step)


class Reaction:
    """Acts on what the detector reports, on every process.

    Collapsed heads, vanished layers and importance that is not finite are alarms. Attention that degenerates
    (`attention_kinds.RULES`) is warned of and goes with the loggers' alerts, but never stops a run and never
    calls a callable written for collapses.

    Args:
        on_collapse: "warn", "alert" (the loggers' alert too), "stop" (graceful), or a callable
            `(trainer, pl_module, events)`.
    """

    def __init__(self, on_collapse: Literal["warn", "alert", "stop"] | Callable[..., None]) -> None:
        self._on_collapse = on_collapse
        self._nonfinite = False

    def to(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        events: Sequence[HeadEvent],
        alert: Callable[[str, str], None],
    ) -> None:
        """React to one probe's events.

        Args:
            trainer: Stopped, with "stop".
            pl_module: Handed to a callable.
            events: What the detector reported.
            alert: Sends title and text to the loggers.

        Raises:
            Exception: What the user's callable raises.
        """
        nonfinite = any(event.kind == "nonfinite" for event in events)
        # Importance that stays broken is one alarm, not one for each probe.
        repeated, self._nonfinite = nonfinite and self._nonfinite, nonfinite
        alarms = [event for event in events if event.kind in _ALARMS and not repeated]
        said = [event for event in events if event in alarms or event.kind in _WARNINGS]
        if callable(self._on_collapse):
            said = [event for event in said if event not in alarms]  # those are the callable's
            if alarms:
                self._on_collapse(trainer, pl_module, alarms)
        if not said:
            return
        text = alarm_text(said)
        rank_zero_warn(f"GMARCallback: {text}")
        if self._on_collapse in ("alert", "stop"):
            alert("GMAR: attention heads", text)
        if self._on_collapse == "stop" and alarms:
            trainer.should_stop = True


# What `run.json` says of the images where there are none: the batches of training, each another one.
_OF_STEPS: Mapping[str, Any] = {
    "source": "step",
    "num_images": 0,
    "num_heatmaps": 0,
    "labels": None,
    "image_names": None,
    "fingerprint": "training batches",
}


def _of_images(probe: ProbeBatch, drawn: int) -> dict[str, Any]:
    return {
        "source": "probe",
        "num_images": len(probe),
        "num_heatmaps": min(drawn, len(probe)),
        "labels": None if probe.labels is None else probe.labels.tolist(),
        "image_names": None if probe.names is None else list(probe.names),
        "fingerprint": probe.fingerprint,
    }


def described(settings: ProbeSettings, schedule: Every, num_images: int, source: Source) -> dict[str, Any]:
    """The callback's settings as the record and the loggers' configuration say them."""
    if source == "step":
        return {
            "read": "training steps",
            "every": schedule.described,
            "module": settings.module,
            "norm": "l2",
        }
    return {
        "every": schedule.described,
        "num_images": num_images,
        "num_heatmaps": settings.drawn,
        "module": settings.module,
        "target": str(settings.target) if callable(settings.target) else settings.target,
        "norm": settings.norm,
        "rollout": settings.rollout,
        "residual": 1.0 if settings.residual is None else settings.residual,
    }
