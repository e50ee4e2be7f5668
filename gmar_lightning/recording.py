"""What becomes of a run's probes on process zero: stored, shown, and acted upon."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info

from gmar_lightning.monitor.drift import DriftTracker
from gmar_lightning.monitor.history import History
from gmar_lightning.monitor.lock import FolderLock
from gmar_lightning.monitor.probe import ProbeBatch
from gmar_lightning.monitor.processes import of_first_process
from gmar_lightning.monitor.record import ProbeRecord, Source
from gmar_lightning.monitor.runfile import OtherModelError, run_of_other_model
from gmar_lightning.monitor.say import SayOnce
from gmar_lightning.monitor.schedule import Every
from gmar_lightning.monitor.settings import ProbeSettings
from gmar_lightning.show.console import opening_line
from gmar_lightning.show.publisher import Display, Publisher
from gmar_lightning.targets import name_of
from gmar_lightning.trainer import class_names_of, logged_metrics, photographs, planned_probes
from gmar_lightning.version import __version__


class Tolerance:
    """What happens to an error that is not the training's: said once, or raised.

    Args:
        on_error: "raise" raises it, "warn" says it.
        say: Says a sentence on the console, once.
    """

    def __init__(self, on_error: Literal["warn", "raise"], say: SayOnce) -> None:
        self._raises, self.say = on_error == "raise", say

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
            self.say(
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
        lock: Keeps other runs out of the record's folder.
        opened: Whether a run has begun; not before `open`.
    """

    def __init__(
        self,
        tolerance: Tolerance,
        history: History | None = None,
        publisher: Publisher | None = None,
        lock: FolderLock | None = None,
        opened: bool = False,
    ) -> None:
        self._tolerance, self._closed, self._open, self._lock = tolerance, False, opened, lock
        self.history, self.publisher = history, publisher

    @property
    def folder(self) -> str | None:
        """Where the record is written; None where there is none."""
        return str(self.history.dir) if self.history is not None and self.history.on_disk else None

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
        path: str | None = None,
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
            path: Of the module, as part of every logged name, where several are watched.
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
        history, lock = _opened(folder, run, trainer.global_step if resumed else None, say)
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
        publisher = Publisher(history, trainer.loggers, display, say, path)
        recording = cls(tolerance, history, publisher, lock, opened=True)
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
        if self.history is not None and self.publisher is not None:
            self._tolerance.run("the record", lambda: self._store(record), record.step)
            if record.classes:
                show(opening_line(self.history.run))
            publisher = self.publisher  # another one, perhaps, than before
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

        def sum_up() -> None:
            if publisher is not None and publisher.history.records and not self._closed:
                self._closed = True
                lines = publisher.close(metrics=logged_metrics(trainer), counts=counts, seconds=seconds)
                trainer.print("\n".join(lines))

        try:
            self._tolerance.run("the summary", sum_up, trainer.global_step)
        finally:
            if self._lock is not None:
                self._lock.release()

    def _store(self, record: ProbeRecord) -> None:
        history, publisher = self.history, self.publisher
        assert history is not None
        assert publisher is not None
        try:
            history.append(record)
        except OtherModelError as error:
            self._tolerance.say(
                f"GMARCallback: the model is not the one of the record ({error}); a new record begins, the one "
                "before is kept beside it (previous_01, ...)"
            )
            folder, run = (
                history.dir if history.on_disk else None,
                run_of_other_model(history.run, history.segment),
            )
            self.history = history = History.open(folder, run)
            self.publisher = publisher.on(history)
            history.append(record)
        if publisher.display.images and not history.input_paths(history.segment):
            history.save_inputs(publisher.display.images)


def _opened(
    folder: Path | None, run: Mapping[str, Any], resume_at: int | None, say: SayOnce
) -> tuple[History, FolderLock | None]:
    """The record in a folder that no other run writes to; in memory where there is none."""
    if folder is None:
        return History.open(None, run), None
    try:
        lock = FolderLock(folder)
        if lock.folder != folder:
            say(f"GMARCallback: another run writes to {folder}; the record of this one goes to {lock.folder}")
        try:
            return History.open(lock.folder, run, resume_at), lock
        except ValueError as error:
            say(
                f"GMARCallback: {error}; what is there is kept in previous_01 (02, ...), and a new record begins"
            )
            return History.create(lock.folder, run), lock
    except OSError as error:
        say(f"GMARCallback: no record can be written to {folder} ({error}); the run goes on without it")
        return History.open(None, run), None


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
        "target": name_of(settings.target) if callable(settings.target) else settings.target,
        "norm": settings.norm,
        "rollout": settings.rollout,
        "residual": 1.0 if settings.residual is None else settings.residual,
    }
