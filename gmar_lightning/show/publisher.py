"""Shows a run's probes to the loggers, and its end to the console. Runs on one process; no sink can stop another."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gmar_lightning.monitor.history import History
from gmar_lightning.monitor.record import ProbeRecord, Source
from gmar_lightning.monitor.say import SayOnce
from gmar_lightning.show import keys
from gmar_lightning.show.console import closing_lines, event_table
from gmar_lightning.show.dashboard import captions, flagged_heads, image_rows, pictures, scalars, summary
from gmar_lightning.show.loggers import adapter_for
from gmar_lightning.show.publication import Adapter, Ending, Publication
from gmar_lightning.show.report import write_report
from gmar_lightning.show.wandb_logger import offline_run

_TABLE = ("step", "layer", "head", "importance", "share", "flagged")


@dataclass(frozen=True, eq=False)
class Display:
    """How a run is shown.

    Attributes:
        images: The photographs that are drawn, uint8 `(height, width, 3)`.
        labels: Of all probe images, or None.
        names: Class names, or None.
        image_names: What captions call each image; None for its number alone.
        per_head: Whether every head gets a number.
        most_media: Pictures of at most so many probes.
        rollouts: Forms of the map whose pictures are shown beside those of the primary one.
    """

    images: Sequence[np.ndarray] = ()
    labels: Sequence[int] | None = None
    names: Sequence[str] | None = None
    image_names: Sequence[str] | None = None
    per_head: bool = False
    most_media: int = 100
    rollouts: Sequence[str] = ()


class Publisher:
    """Shows each probe to the loggers.

    A sink that fails (a logger that raises, a disk that takes no picture) is reported once; the others and the
    training go on.

    Args:
        history: The run's record.
        loggers: The trainer's loggers.
        display: How the run is shown.
        say: Says a sentence on the console, once.
        path: Of the module, as part of every logged name, where several are watched.
    """

    def __init__(
        self,
        history: History,
        loggers: Sequence[Any],
        display: Display = Display(),
        say: SayOnce | None = None,
        path: str | None = None,
    ) -> None:
        self._path = path
        self.history, self.loggers, self.display = history, list(loggers), display
        self._say = SayOnce() if say is None else say
        self._source: Source = "step" if history.run.get("source") == "step" else "probe"
        self._adapters = [adapter_for(logger) for logger in self.loggers]
        for adapter in self._adapters:
            adapter.source, adapter.path = self._source, path
        self._opened = False
        self._shown = self._at = 0
        self._media_every = 1

    def plan(self, probes: int | None) -> None:
        """Told how many probes the run will take, None where nobody knows: pictures are spread over them."""
        self._media_every = max(1, math.ceil((probes or 0) / self.display.most_media))

    def on(self, history: History) -> Publisher:
        """The same for another record."""
        other = Publisher(history, self.loggers, self.display, self._say)
        other._media_every = self._media_every
        return other

    def show(self, record: ProbeRecord) -> None:
        """Show a probe that the history already has.

        Args:
            record: The probe, with its maps.
        """
        self._at = record.step
        if record.failure is not None:
            return
        due = self._shown % self._media_every == 0 and record.source == "probe"
        self._shown += 1
        # Drawn only when they are due: the picture of a whole run takes longer as the run grows.
        media = self._guarded("drawing", lambda: self._drawn(record)) if due else None
        # A flag is rare, and its pictures belong to its step: they are never thinned out.
        heads = (
            self._guarded("drawing", lambda: flagged_heads(self.history, record, self.display.images)) or {}
        )
        publication = self._publication(record, media, heads)
        self._to_loggers(lambda adapter: self._hand(adapter, publication))
        self._opened = True

    def alert(self, title: str, text: str) -> None:
        """Send one alert to every logger that knows alerts."""
        self._to_loggers(lambda adapter: adapter.alert(title, text))

    def close(
        self, *, metrics: Mapping[str, float], counts: tuple[int, int], seconds: tuple[float, float]
    ) -> list[str]:
        """Write the report and hand the loggers what belongs to the end of a run.

        Args:
            metrics: What the trainer logged last.
            counts: Probes taken, and failed among them.
            seconds: Time spent in probes, and in the whole fit.

        Returns:
            The run in a few lines for the console.
        """
        history, report = self.history, None
        if history.on_disk and history.records:
            report = self._guarded("the report", lambda: write_report(history.dir))
        if self._opened:
            ending = Ending(
                history.records[-1].step,
                [[row[name] for name in _TABLE] for row in history.rows()],
                report,
                history.dir if history.on_disk else None,
                self._named({keys.of_source(name, self._source): v for name, v in summary(history).items()}),
            )
            self._to_loggers(lambda adapter: adapter.close(ending))
        flagged = history.records[-1].flagged if history.records else ()
        lines = closing_lines(
            metrics=metrics,
            probes=counts[0],
            failed=counts[1],
            probe_seconds=seconds[0],
            run_seconds=seconds[1],
            flagged=[(history.layers[layer], head) for layer, head in flagged],
            folder=history.dir if history.on_disk else None,
            source=self._source,
            wandb_offline=self._guarded("WandbLogger", lambda: offline_run(self.loggers)),
        )
        lines[0] += f" {self._path}" if self._path else ""
        return lines + event_table(history.events)

    def _named(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The same under the names that are logged for this module."""
        return {keys.under(self._path, name): value for name, value in values.items()}

    def _drawn(self, record: ProbeRecord) -> dict[str, Any]:
        media = pictures(self.history, record, self.display.images, self.display.rollouts)
        stored = self.history.records[-1]
        if stored.stored_maps is not None and len(media["heatmaps"]):
            self._guarded("the pictures", lambda: self.history.save_overlays(stored, media["heatmaps"]))
        return media

    def _publication(
        self, record: ProbeRecord, media: Mapping[str, Any] | None, flagged: Mapping[str, np.ndarray]
    ) -> Publication:
        heads, display = self.history.heads, self.display
        numbers, flagged = self._named(scalars(record, heads, display.per_head)), self._named(flagged)
        names = [keys.of_source(name, record.source) for name, _ in keys.head_names(heads)]
        hidden = frozenset(keys.under(self._path, name) for name in names if display.per_head)
        events = [asdict(event) for event in record.events]
        if media is None:
            return Publication(record.step, numbers, hidden, grids=flagged, events=events, path=self._path)
        return Publication(
            record.step,
            numbers,
            hidden,
            captions=captions(record, display.labels, display.names, display.image_names),
            inputs=() if self._opened else display.images,
            photographs=display.images,
            events=events,
            image_rows=image_rows(record, display.labels, display.names, display.image_names)[
                : len(display.images)
            ],
            path=self._path,
            **{**media, "grids": {**self._named(media["grids"]), **flagged}},
        )

    def _hand(self, adapter: Adapter, publication: Publication) -> None:
        if not self._opened:
            settings = self.history.run.get("settings") or {}
            adapter.open(settings, list(publication.scalars), publication.hidden)
            name = type(adapter.logger).__name__
            if (
                self._source == "probe"
                and not adapter.pictures
                and self.history.on_disk
                and name != "DummyLogger"
            ):
                self._say(f"GMARCallback: {name} takes numbers only; the pictures are in {self.history.dir}")
        adapter.publish(publication)

    def _to_loggers(self, action: Callable[[Adapter], None]) -> None:
        """Do it with every logger; one that fails is said once, and the others go on."""
        for adapter in self._adapters:
            self._guarded(type(adapter.logger).__name__, lambda adapter=adapter: action(adapter))

    def _guarded(self, sink: str, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:
            self._say(
                f"GMARCallback: {sink} failed at step {self._at} and is left out ({type(error).__name__}: {error})",
                sink,
            )
            return None
