"""What a run's record says about its own pictures: how faithful they are, and whether the heat sticks to one spot."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from gmar_lightning.monitor.history import History
from gmar_lightning.monitor.record import ProbeRecord

# The fixed region is the twentieth of the grid that holds most heat, over all images together.
REGION_PART = 0.05
# An object that moves, or differs in shape, leaves a region as small as that with far less than half of the heat.
SHORTCUT_SHARE = 0.5
# It has to be so in nine images of ten, by at least this much: one odd class does not make a shortcut.
SHORTCUT_LEAST = 0.3
# Fewer images, or a coarser grid, and a centred object fills the region by itself.
LEAST_IMAGES, LEAST_CELLS = 8, 36
# A map that is hardly better than a random one explains nothing; the difference of areas is noisy on 4 images.
FAITHFUL_MARGIN = 0.02
# Above this rank correlation with the runner-up's map the class hardly matters.
CLASS_BLIND = 0.9


@dataclass(frozen=True)
class FixedRegion:
    """How much of the heat lies in the same few patches of every image.

    Attributes:
        step: Of the probe.
        share: Median over the images of the part of their heat that lies in the region that the other images have.
        least: The tenth percentile of the same.
        first: The median at the first probe, in the same region; NaN without maps.
        patches: `(row, column)` of the region, hottest first.
        grid: `(rows, columns)` of the maps.
        images: How many images were looked at.
    """

    step: int
    share: float
    least: float
    first: float
    patches: tuple[tuple[int, int], ...]
    grid: tuple[int, int]
    images: int

    @property
    def shortcut_like(self) -> bool:
        """Whether most of the heat sits in it, whatever the image shows."""
        enough = self.images >= LEAST_IMAGES and self.grid[0] * self.grid[1] >= LEAST_CELLS
        return enough and self.share >= SHORTCUT_SHARE and self.least >= SHORTCUT_LEAST

    @property
    def text(self) -> str:
        """The figures in a sentence."""
        row, column = self.patches[0]
        before = f" (first probe: {_percent(self.first)})" if math.isfinite(self.first) else ""
        count = len(self.patches)
        what = "the same patch" if count == 1 else f"the same {count} patches"
        return (
            f"{_percent(self.share)} of the heat{before} lies in {what} of {self.grid[0] * self.grid[1]} "
            f"in every image, around row {row + 1}, column {column + 1}"
        )


def fixed_region(history: History) -> FixedRegion | None:
    """The region that holds most heat over all images of the last probe; None without maps."""
    stored = [record for record in history.records if record.stored_maps]
    if not stored:
        return None
    last = _heat_parts(history, stored[-1])
    if last is None:
        return None
    count = max(1, round(REGION_PART * last.shape[1] * last.shape[2]))
    shares = _shares_elsewhere_hot(last.reshape(len(last), -1), count)
    order = np.argsort(-last.mean(axis=0).ravel(), kind="stable")[:count]
    begin = next(record for record in stored if record.segment == stored[-1].segment)
    first = _heat_parts(history, begin)
    if first is None or first.shape[1:] != last.shape[1:]:
        before = math.nan
    else:
        before = float(np.median(first.reshape(len(first), -1)[:, order].sum(axis=1)))
    return FixedRegion(
        step=stored[-1].step,
        share=float(np.median(shares)),
        least=float(np.quantile(shares, 0.1)),
        first=before,
        patches=tuple((int(at) // last.shape[2], int(at) % last.shape[2]) for at in order),
        grid=(last.shape[1], last.shape[2]),
        images=len(last),
    )


def _shares_elsewhere_hot(parts: np.ndarray, count: int) -> np.ndarray:
    """Part of each image's heat in the `count` patches that are hottest in the other images, `(images,)`.

    The image itself has no say in its region: otherwise a few images with one hot patch each would make a region
    that holds them all.
    """
    if len(parts) < 2:
        return np.zeros(len(parts))
    others = parts.sum(axis=0) - parts
    regions = np.argsort(-others, axis=1, kind="stable")[:, :count]
    return np.take_along_axis(parts, regions, axis=1).sum(axis=1)


def measured(history: History) -> list[ProbeRecord]:
    """Probes at which the maps themselves were tested."""
    return [
        record for record in history.records if any(map(math.isfinite, (record.faithfulness or {}).values()))
    ]


def evidence_lines(history: History) -> list[str]:
    """What is known of how far the run's pictures can be relied on, in a few sentences with figures."""
    lines = []
    tested = measured(history)
    if tested:
        lines += _faithfulness(tested[0], tested[-1])
    region = fixed_region(history)
    # a shortcut is a finding of the verdict, with the same figures
    if region is not None and not region.shortcut_like:
        lines.append(f"{region.text[0].upper()}{region.text[1:]}.")
    return lines


def _faithfulness(first: ProbeRecord, last: ProbeRecord) -> list[str]:
    values = last.faithfulness or {}
    lines = []
    beside = [
        values.get(f"insertion_minus_deletion{which}", math.nan) for which in ("", "_random", "_rollout")
    ]
    if math.isfinite(beside[0]):
        before = (first.faithfulness or {}).get("insertion_minus_deletion", math.nan)
        started = (
            f" ({before:.2f} at step {first.step})" if first is not last and math.isfinite(before) else ""
        )
        poor = beside[0] < beside[1] + FAITHFUL_MARGIN
        warning = " The map is no better than a random one: do not rely on it." if poor else ""
        lines.append(
            f"Insertion - deletion at step {last.step}: {beside[0]:.2f}{started}; a random map {beside[1]:.2f}, "
            f"plain rollout {beside[2]:.2f}.{warning}"
        )
    sensitivity = values.get("class_sensitivity", math.nan)
    if math.isfinite(sensitivity):
        blind = ": the maps hardly depend on the class" if sensitivity > CLASS_BLIND else ""
        lines.append(
            f"Class sensitivity {sensitivity:.2f} (rank correlation with the map of the runner-up class; 1 = "
            f"class-blind){blind}."
        )
    shuffled = values.get("randomisation", math.nan)
    if math.isfinite(shuffled):
        lines.append(
            f"Randomisation {shuffled:.2f} (rank correlation with the map after the top block's weights were "
            "shuffled; 1 = the weights do not matter)."
        )
    return lines


def _heat_parts(history: History, record: ProbeRecord) -> np.ndarray | None:
    """Primary maps `(images, grid_h, grid_w)`, each as parts of its own heat; None without a usable one."""
    maps = next(iter(history.maps_of(record).values()), None)
    if maps is None or maps.ndim != 3:
        return None
    maps = np.clip(maps.astype(np.float64), 0, None)
    totals = maps.sum(axis=(1, 2))
    usable = np.isfinite(totals) & (totals > 0)
    return maps[usable] / totals[usable, None, None] if usable.any() else None


def _percent(part: float) -> str:
    return f"{100 * part:.0f} %"
