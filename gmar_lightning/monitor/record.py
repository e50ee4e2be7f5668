"""One probe as a line of the record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from gmar_lightning.monitor.drift import rank_correlation, top_overlap
from gmar_lightning.monitor.events import HeadEvent
from gmar_lightning.monitor.measurement import Measurement


class DriftTracker:
    """Compares each probe's heatmaps with those of the first probe and of the one before.

    Args:
        first: Maps of the first probe, `(images, grid_h, grid_w)`; None before there is one.
        previous: Maps of the last probe.
    """

    def __init__(self, first: np.ndarray | None = None, previous: np.ndarray | None = None) -> None:
        self._first, self._previous = first, previous

    def compare(self, heatmaps: np.ndarray) -> dict[str, list[float]] | None:
        """Rank correlation and top-20 % overlap per image; None at the first probe or after a change of shape."""
        first, previous = self._first, self._previous
        self._previous = heatmaps
        if first is None or previous is None or first.shape != heatmaps.shape or first.ndim != 3:
            self._first = heatmaps
            return None
        return {
            "rank_correlation_first": rank_correlation(heatmaps, first).tolist(),
            "rank_correlation_previous": rank_correlation(heatmaps, previous).tolist(),
            "top20_overlap_first": top_overlap(heatmaps, first).tolist(),
            "top20_overlap_previous": top_overlap(heatmaps, previous).tolist(),
        }


def probe_record(
    found: Measurement,
    events: Sequence[HeadEvent],
    flagged: Sequence[tuple[int, int]],
) -> dict[str, Any]:
    """What a probe found, as it is written to `history.jsonl` (without time, place and drift).

    Args:
        found: The measurement.
        events: What the detector reported.
        flagged: `(layer, head)` of every head flagged now.

    Returns:
        The record.
    """
    return {
        "importance": found.importance,
        "shares": found.shares,
        "entropy": found.entropy,
        "distance": found.distance,
        "output_norm": found.output_norm,
        "events": [asdict(event) for event in events],
        "flagged": [list(head) for head in flagged],
        "drift": None,
        "targets": found.targets.tolist(),
        "predictions": found.logits.argmax(-1).tolist(),
        "probabilities": found.probabilities.max(-1).tolist(),
        "error": None,
    }


def failure_record(error: BaseException) -> dict[str, Any]:
    """The line of a probe that failed."""
    cause = f"{type(error).__name__}: {error}"
    return {"importance": None, "events": [], "flagged": [], "drift": None, "error": cause}
