"""Which kept maps belong on a head's card: before it was flagged, now, and beside a healthy head of its layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from gmar_lightning.monitor.events import HeadEvent
from gmar_lightning.monitor.history import History
from gmar_lightning.monitor.record import ProbeRecord
from gmar_lightning.show.codec import at_most, base64_of, nibbles, quantised
from gmar_lightning.show.head_pictures import strengths

# Maps of single heads are small pictures: a finer grid is averaged down.
_SIDE = 14
# Strengths are logarithmic over four powers of ten; 255 stands for unknown.
_DECADES = 4


def raised(events: Iterable[HeadEvent]) -> list[HeadEvent]:
    """Flags of single heads, without those that end one."""
    return [e for e in events if e.head is not None and e.layer is not None and not ends_flag(e.kind)]


def ends_flag(kind: str) -> bool:
    """Whether an event of this kind takes a flag back rather than raises one."""
    return kind in ("recovered", "woke") or kind.endswith(("_end", "_restored"))


def healthy_sibling(record: ProbeRecord, layer: int, head: int) -> int | None:
    """The unflagged head of the same layer that contributes most; None in a layer of one head."""
    table = record.signals.get("contribution", record.importance)
    if table is None:
        return None
    others = [h for h in range(table.shape[1]) if h != head and np.isfinite(table[layer, h])]
    healthy = [h for h in others if (layer, h) not in record.flagged]
    return max(healthy or others, key=lambda h: table[layer, h], default=None)


def last_healthy(records: Sequence[ProbeRecord], event: HeadEvent, segment: int) -> ProbeRecord | None:
    """The last probe before a flag's condition began that keeps maps of heads; None without one."""
    before = [r for r in records if r.stored_head_maps and r.segment == segment and r.step < event.since_step]
    return before[-1] if before else None


def embedded_head_maps(history: History, budget: int) -> dict[str, Any] | None:
    """Maps of heads for the report: all heads at a few probes, and flagged heads where their cards need them.

    All heads of the last probe come first, then of the first, then of those between as far as `budget` goes;
    what flagged heads looked like before is kept in any case.

    Args:
        history: The run.
        budget: Characters.

    Returns:
        Grid, images and entries; None where the record keeps no maps of heads.
    """
    # A record may name a file that had to go again for its own budget.
    read = [(record, history.head_maps_of(record)) for record in history.records if record.stored_head_maps]
    maps = {record.global_step: _small(found) for record, found in read if found is not None}
    kept = [record for record, found in read if found is not None]
    if not kept:
        return None
    last = maps[kept[-1].global_step]
    images = _affordable_images(last, budget)
    entries: dict[tuple[int, bool], dict[str, Any]] = {}
    for record, cells in _flagged_maps(history, kept):
        entries[record.global_step, False] = _entry(record, maps[record.global_step][:images], sorted(cells))
    spent = sum(map(_length, entries.values()))
    for record in _by_importance(kept):
        entry = _entry(record, maps[record.global_step][:images], None)
        spent += _length(entry)
        # the last probe is what the page opens with
        if spent > budget and record is not kept[-1]:
            break
        entries[record.global_step, True] = entry
    ordered = [entries[at] for at in sorted(entries)]
    return {"h": last.shape[-2], "w": last.shape[-1], "images": images, "entries": ordered}


def _length(entry: dict[str, Any]) -> int:
    return len(entry["data"]) + len(entry["peaks"])


def _affordable_images(maps: np.ndarray, budget: int) -> int:
    count, layers, heads, height, width = maps.shape
    one = layers * heads * (height * width // 2 + 2) * 4 // 3
    # two whole probes are to fit, the last and the first
    return int(np.clip(budget // (2 * one), 1, count))


def _flagged_maps(
    history: History, kept: Sequence[ProbeRecord]
) -> list[tuple[ProbeRecord, set[tuple[int, int]]]]:
    """Probes that a card of a flagged head shows, each with its heads."""
    chosen: dict[int, tuple[ProbeRecord, set[tuple[int, int]]]] = {}
    for record in history.records:
        for event in raised(record.events):
            assert event.layer is not None
            assert event.head is not None
            at = [r for r in kept if r.step <= event.step and r.segment == record.segment][-1:]
            for shown in (last_healthy(kept, event, record.segment), *at):
                if shown is not None:
                    cells = chosen.setdefault(shown.global_step, (shown, set()))[1]
                    cells.add((event.layer, event.head))
    return list(chosen.values())


def _by_importance(kept: Sequence[ProbeRecord]) -> list[ProbeRecord]:
    """Last, first, then halving the longest gap: any beginning of the list is spread over the run."""
    order, gaps = [len(kept) - 1, 0], [(0, len(kept) - 1)]
    while gaps:
        low, high = gaps.pop(0)
        middle = (low + high) // 2
        if middle in (low, high):
            continue
        order.append(middle)
        gaps += [(low, middle), (middle, high)]
    return [kept[index] for index in dict.fromkeys(order)]


def _small(maps: np.ndarray) -> np.ndarray:
    if max(maps.shape[-2:]) <= _SIDE:
        return maps
    flat = maps.reshape(-1, *maps.shape[-2:])
    small = np.stack([at_most(one, _SIDE) for one in flat])
    return small.reshape(*maps.shape[:-2], *small.shape[-2:])


def _entry(record: ProbeRecord, maps: np.ndarray, cells: Sequence[tuple[int, int]] | None) -> dict[str, Any]:
    maps = maps.astype(np.float64)
    strength = strengths(maps)
    with np.errstate(divide="ignore"):
        logarithmic = 1 + np.log10(strength) / _DECADES
    known = np.asarray(np.isfinite(maps).all(axis=(-2, -1)))
    # numbers below the lowest decade are as good as zero
    levels = np.where(known, np.clip(logarithmic, 0, 1), np.nan)
    peaks = maps.max(axis=(-2, -1), keepdims=True)
    unit = np.divide(maps, peaks, out=np.zeros_like(maps), where=peaks > 0)
    unit = np.where(known[..., None, None], unit, np.nan)
    # head by head, and within a head image by image, as the page reads them
    unit, levels = np.moveaxis(unit, 0, 2), np.moveaxis(levels, 0, 2)
    width = maps.shape[2]
    if cells is not None:
        rows, columns = zip(*cells, strict=True)
        unit, levels = unit[list(rows), list(columns)], levels[list(rows), list(columns)]
    patches = unit.reshape(-1, maps.shape[-2] * maps.shape[-1])
    # each map begins on a byte
    patches = np.pad(patches, ((0, 0), (0, patches.shape[1] % 2)))
    return {
        "step": record.step,
        "segment": str(record.segment),
        "cells": None if cells is None else [layer * width + head for layer, head in cells],
        "peaks": base64_of(quantised(levels, 0.0, 1.0, 255).astype(np.uint8)),
        "data": base64_of(nibbles(patches)),
    }
