"""What a logger is handed: one probe, and the end of a run; and the least an adapter for a logger does with it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gmar_lightning.monitor.record import Source
from gmar_lightning.show import keys


@dataclass(frozen=True, eq=False)
class Publication:
    """What one probe shows.

    Attributes:
        step: The logger's x, as Lightning's own training rows have it.
        scalars: Name to number; NaN where there is none this time.
        hidden: Names among the scalars that get no panel of their own.
        heatmaps: Overlays, uint8 `(height, width, 3)` each, in probe order; empty when media are thinned out.
        others: Name to overlays of another form of the map, likewise.
        captions: One per overlay.
        inputs: The clean photographs, at the first probe only.
        grids: Name to picture, uint8 `(height, width, 3)`.
        importance: Relative shares of all heads, for the histogram; empty when media are thinned out.
        photographs: The clean photographs again, one per overlay, for tables that show both in one row.
        events: What the detector reported at this probe, with the fields of `HeadEvent`.
        image_rows: What is known of each drawn image: index, label, prediction, probability, score, drift.
        path: Of the module, where several are watched; scalars and grids have it in their names.
    """

    step: int
    scalars: Mapping[str, float]
    hidden: frozenset[str] = frozenset()
    heatmaps: Sequence[np.ndarray] = ()
    others: Mapping[str, Sequence[np.ndarray]] = field(default_factory=dict)
    captions: Sequence[str] = ()
    inputs: Sequence[np.ndarray] = ()
    grids: Mapping[str, np.ndarray] = field(default_factory=dict)
    importance: np.ndarray = field(default_factory=lambda: np.empty(0))
    photographs: Sequence[np.ndarray] = ()
    events: Sequence[Mapping[str, Any]] = ()
    image_rows: Sequence[Mapping[str, Any]] = ()
    path: str | None = None

    @property
    def finite(self) -> dict[str, float]:
        """The scalars that are numbers, for services that plot or refuse NaN."""
        return {name: value for name, value in self.scalars.items() if math.isfinite(value)}

    @property
    def lists(self) -> dict[str, Sequence[np.ndarray]]:
        """Name to pictures, one per probe image; names without pictures this time are left out."""
        every = {keys.HEATMAPS: self.heatmaps, **self.others, keys.INPUTS: self.inputs}
        return {keys.under(self.path, name): images for name, images in every.items() if len(images)}


@dataclass(frozen=True, eq=False)
class Ending:
    """What belongs to the end of a run.

    Attributes:
        step: The logger's x of the last probe.
        rows: `(step, layer, head, importance, share, flagged)` for each probe and head.
        report: The HTML report, if it was written.
        record: Folder of the local record, if there is one.
        summary: Numbers and names that make runs sortable.
    """

    step: int
    rows: Sequence[Sequence[Any]] = ()
    report: Path | None = None
    record: Path | None = None
    summary: Mapping[str, Any] = field(default_factory=dict)


class Adapter:
    """Hands probes to one logger: the numbers, through the interface that every Lightning logger has.

    Attributes:
        logger: The logger.
        pictures: Whether `publish` sends pictures too.
        source: Where the numbers come from; decides the names.
        path: Of the module, where several are watched; is part of the names.
    """

    pictures = False
    source: Source = "probe"
    path: str | None = None

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def open(self, settings: Mapping[str, Any], scalars: Sequence[str], hidden: frozenset[str]) -> None:
        """Announce names and settings before the first publication."""

    def publish(self, shown: Publication) -> None:
        """Hand over one probe."""
        # With NaN where a number is missing: a CSV file keeps the columns of its first row.
        self.logger.log_metrics(dict(shown.scalars), step=shown.step)

    def alert(self, title: str, text: str) -> None:
        """Wake somebody up, where the service can."""

    def close(self, ending: Ending) -> None:
        """Hand over what belongs to the end of a run."""

    def key(self, name: str) -> str:
        """The name, as this source of this module logs it."""
        return keys.of_source(keys.under(self.path, name), self.source)

    def prefixed(self, name: str) -> str:
        """The name as `log_metrics` of this logger writes it."""
        prefix = getattr(self.logger, "_prefix", "")
        return f"{prefix}{self.logger.LOGGER_JOIN_CHAR}{name}" if prefix else name
