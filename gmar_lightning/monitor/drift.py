"""How far heatmaps have moved: two maps of the same image, before and after, compared image by image."""

from __future__ import annotations

import numpy as np


class DriftTracker:
    """Compares each probe's heatmaps with those of the first probe and of the one before.

    Args:
        first: Maps of the first probe, `(images, grid_h, grid_w)`; None before there is one.
        previous: Maps of the last probe.
    """

    def __init__(self, first: np.ndarray | None = None, previous: np.ndarray | None = None) -> None:
        self._first, self._previous = first, previous

    def compare(self, heatmaps: np.ndarray) -> dict[str, np.ndarray] | None:
        """Rank correlation and top-20 % overlap per image; None at the first probe or after a change of shape."""
        first, previous = self._first, self._previous
        self._previous = heatmaps
        if first is None or previous is None or first.shape != heatmaps.shape or first.ndim != 3:
            self._first = heatmaps
            return None
        return {
            "rank_correlation_first": rank_correlation(heatmaps, first),
            "rank_correlation_previous": rank_correlation(heatmaps, previous),
            "top20_overlap_first": top_overlap(heatmaps, first),
            "top20_overlap_previous": top_overlap(heatmaps, previous),
        }


def rank_correlation(maps_a: np.ndarray, maps_b: np.ndarray) -> np.ndarray:
    """Spearman correlation of two maps per image: 1 same order of patches, 0 unrelated, -1 reversed.

    Ties share their average rank.

    Args:
        maps_a: `(images, grid_h, grid_w)`.
        maps_b: same shape.

    Returns:
        `(images,)`; NaN where a map is constant or not finite, as it has no order.

    Raises:
        ValueError: the shapes differ.
    """
    flat_a, flat_b = _flat_pair(maps_a, maps_b)
    ranks_a, ranks_b = _centred_ranks(flat_a), _centred_ranks(flat_b)
    norms = np.sqrt((ranks_a**2).sum(axis=1) * (ranks_b**2).sum(axis=1))
    usable = _has_order(flat_a) & _has_order(flat_b)
    return np.where(usable, (ranks_a * ranks_b).sum(axis=1) / np.where(norms > 0, norms, 1.0), np.nan)


def top_overlap(maps_a: np.ndarray, maps_b: np.ndarray, fraction: float = 0.2) -> np.ndarray:
    """Part of the hottest patches that two maps have in common, per image: 1 all, `fraction` by chance.

    Patches tied at the border count in part, so that the order of patches does not matter.

    Args:
        maps_a: `(images, grid_h, grid_w)`.
        maps_b: same shape.
        fraction: how much of a map counts as hottest, above 0 and up to 1; at least one patch.

    Returns:
        `(images,)` between 0 and 1; NaN where a map is constant or not finite.

    Raises:
        ValueError: the shapes differ, or `fraction` is outside its range.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be above 0 and up to 1, not {fraction}")
    flat_a, flat_b = _flat_pair(maps_a, maps_b)
    count = max(1, round(fraction * flat_a.shape[1]))
    common = np.minimum(_membership(flat_a, count), _membership(flat_b, count)).sum(axis=1)
    return np.where(_has_order(flat_a) & _has_order(flat_b), common / count, np.nan)


def _flat_pair(maps_a: np.ndarray, maps_b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(maps_a, dtype=np.float64), np.asarray(maps_b, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 3 or 0 in a.shape[1:]:
        raise ValueError(
            f"two (images, grid_h, grid_w) arrays of one shape needed, not {a.shape} and {b.shape}"
        )
    return a.reshape(len(a), -1), b.reshape(len(b), -1)


def _has_order(flat: np.ndarray) -> np.ndarray:
    return np.isfinite(flat).all(axis=1) & (flat.max(axis=1) > flat.min(axis=1))


def _centred_ranks(flat: np.ndarray) -> np.ndarray:
    ranks = np.empty_like(flat)
    for row, values in enumerate(flat):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks[row] = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return ranks - (flat.shape[1] + 1) / 2


def _membership(flat: np.ndarray, count: int) -> np.ndarray:
    border = np.sort(flat, axis=1)[:, -count][:, None]
    above, tied = flat > border, flat == border
    places = count - above.sum(axis=1, keepdims=True)
    return above + tied * places / np.maximum(tied.sum(axis=1, keepdims=True), 1)
