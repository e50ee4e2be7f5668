"""Runs side by side, as text for the terminal."""

from collections.abc import Sequence

import numpy as np

from gmar_lightning.monitor.drift import rank_correlation
from gmar_lightning.monitor.history import History
from gmar_lightning.monitor.record import effective_heads
from gmar_lightning.show.evidence import evidence_lines
from gmar_lightning.show.grids import short_names
from gmar_lightning.show.metric_names import accuracy_name, loss_name
from gmar_lightning.show.ranking import mean_contribution, prune_order
from gmar_lightning.show.report import run_names
from gmar_lightning.show.verdict import collapses, drift_from_first, ends, judge


def compare(histories: Sequence[History], names: Sequence[str] | None = None) -> str:
    """Verdicts, key numbers, collapses and layers of the runs, as text.

    Args:
        histories: the runs.
        names: what to call them; by default the endings of their folders.

    Returns:
        Several lines: a verdict per run, then tables with a column per run.
    """
    names = list(names) if names is not None else run_names([history.dir for history in histories])
    parts = ["\n".join(_verdict_lines(h, n)) for h, n in zip(histories, names, strict=True)]
    good = [any(record.importance is not None for record in history.records) for history in histories]
    seen = [(h, n) for h, n, usable in zip(histories, names, good, strict=True) if usable]
    if seen:
        columns = [name for _, name in seen]
        parts.append(_table(["", *columns], _number_rows([h for h, _ in seen])))
        parts.append(_table(["collapsed heads", *columns], _collapse_rows([h for h, _ in seen])))
        if len({tuple(h.layers) for h, _ in seen}) == 1:
            title = "layer: effective heads, first -> last; raw importance, last / first"
            parts.append(title + "\n" + _table(["layer", *columns], _layer_rows([h for h, _ in seen])))
        parts.append(_same_images([h for h, _ in seen], columns))
    parts += [_ranking(h, n if len(histories) > 1 else "") for h, n in zip(histories, names, strict=True)]
    return "\n\n".join(part for part in parts if part)


def _same_images(histories: Sequence[History], names: Sequence[str]) -> str:
    """For runs with the probe images of the first one: how alike the last maps are, image by image."""
    first, same = histories[0], []
    for history, name in zip(histories[1:], names[1:], strict=True):
        if history.run.get("fingerprint") != first.run.get("fingerprint"):
            continue
        maps, others = (_last_maps(one) for one in (first, history))
        if maps is not None and others is not None and maps.shape == others.shape:
            alike = rank_correlation(others, maps)
            same.append([name, *(f"{value:.2f}" for value in alike[:8]), f"{np.nanmean(alike):.2f}"])
    if not same:
        return ""
    header = [f"same images as {names[0]}", *(f"#{index}" for index in range(len(same[0]) - 2)), "mean"]
    return "likeness of the last maps (rank correlation)\n" + _table(header, same)


def _last_maps(history: History) -> np.ndarray | None:
    """Maps of the last probe of the first segment, the one that the fingerprint is of."""
    mapped = [record for record in history.records if record.stored_maps and record.segment == 0]
    maps = next(iter(history.maps_of(mapped[-1]).values()), None) if mapped else None
    return maps if maps is not None and maps.ndim == 3 else None


def _ranking(history: History, name: str) -> str:
    """The heads that contribute most and least, or nothing where the record does not say."""
    if not any("contribution" in record.signals for record in history.records):
        return ""
    order, table = prune_order(history), mean_contribution(history)

    def listed(cells: Sequence[tuple[int, int]]) -> str:
        return ", ".join(f"{history.layers[at[0]]} head {at[1]} ({table[at]:.2g})" for at in cells)

    title = f"heads by contribution{f', {name}' if name else ''}"
    return f"{title}\n  keep   {listed(order[:-6:-1])}\n  prune  {listed(order[:5])}"


def layer_change(history: History) -> np.ndarray:
    """Raw importance of each layer at the last probe, as a multiple of that at the first, `(layers,)`."""
    first, last = (np.nansum(history.table(record, "importance"), axis=1) for record in ends(history))
    return np.divide(last, first, out=np.full_like(last, np.nan), where=first > 0)


def _verdict_lines(history: History, name: str) -> list[str]:
    verdict = judge(history)
    said = [*(finding.text for finding in verdict.findings), *evidence_lines(history)]
    return [f"{name}: {verdict.headline}", *(f"  - {line}" for line in said)]


def _number_rows(histories: Sequence[History]) -> list[list[str]]:
    rows = {
        "probes": [str(len(h.records)) for h in histories],
        "last step": [str(h.records[-1].step) for h in histories],
        "accuracy": [_course(h, accuracy_name(h)) for h in histories],
        "loss": [_course(h, loss_name(h)) for h in histories],
        "effective heads": [_effective(h) for h in histories],
        "likeness to first maps": [_last_drift(h) for h in histories],
        "collapsed, standing": [
            str(sum(item.recovered_step is None for item in collapses(h))) for h in histories
        ],
        "collapsed, ever": [str(len({(c.layer, c.head) for c in collapses(h)})) for h in histories],
    }
    return [[label, *cells] for label, cells in rows.items() if any(cell != "-" for cell in cells)]


def _collapse_rows(histories: Sequence[History]) -> list[list[str]]:
    found = [{(c.layer, c.head): c for c in collapses(history)} for history in histories]
    rows = []
    for layer, head in sorted({cell for cells in found for cell in cells}):
        name = next(cells[layer, head].layer_name for cells in found if (layer, head) in cells)
        rows.append([f"{name} head {head}"])
        for cells in found:
            item = cells.get((layer, head))
            back = f", back at {item.recovered_step}" if item and item.recovered_step is not None else ""
            rows[-1].append(f"step {item.step} (since {item.since_step}){back}" if item else "-")
    return rows


def _layer_rows(histories: Sequence[History]) -> list[list[str]]:
    rows = [[name] for name in short_names(histories[0].layers)]
    for history in histories:
        before, after = (effective_heads(history.table(record, "shares")) for record in ends(history))
        for row, first, last, factor in zip(rows, before, after, layer_change(history), strict=True):
            row.append(f"{first:.1f} -> {last:.1f}; x{factor:.2g}")
    return rows


def _course(history: History, name: str | None) -> str:
    values = history.metric(name) if name else np.array([])
    values = values[np.isfinite(values)]
    return f"{values[0]:.3g} -> {values[-1]:.3g}" if values.size else "-"


def _effective(history: History) -> str:
    first, last = (np.nanmean(effective_heads(history.table(r, "shares"))) for r in ends(history))
    return f"{first:.1f} -> {last:.1f}"


def _last_drift(history: History) -> str:
    values = drift_from_first(history)
    values = values[np.isfinite(values)]
    return f"{values[-1]:.2f}" if values.size else "-"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    widths = [max(len(row[k]) for row in [header, *rows]) for k in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    title = "  ".join(cell.ljust(width) for cell, width in zip(header, widths, strict=True)).rstrip()
    return "\n".join([title, "-" * len(title), *lines])
