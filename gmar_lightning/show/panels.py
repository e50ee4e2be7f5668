"""What a probe's record says, as numbers and pictures for a dashboard."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from gmar_lightning.monitor.history import History
from gmar_lightning.show.grids import evolution_raster, importance_grid, relative_shares
from gmar_lightning.show.render import overlay


def scalars(record: Mapping[str, Any], heads: Sequence[int], per_head: bool = False) -> dict[str, float]:
    """The numbers of one probe, always under the same names.

    Args:
        record: A line of the record, as `History` holds it.
        heads: Heads of each layer.
        per_head: Also one number per head.

    Returns:
        Name to number, NaN where there is none.
    """
    importance = _table(record.get("importance"), heads)
    shares = _table(record.get("shares"), heads)
    entropy = _table(record.get("entropy"), heads)
    relative, effective = relative_shares(shares), effective_heads(shares)
    newly = sum(event["kind"] == "collapsed" for event in record["events"])
    found = {
        "gmar/collapsed_heads": float(len(record["flagged"])),
        "gmar/newly_collapsed": float(newly),
        "gmar/effective_heads": _mean(effective),
        "gmar/importance_min": float(np.nanmin(relative)) if np.isfinite(relative).any() else np.nan,
        "gmar/attention_entropy": _mean(entropy),
        "gmar/heatmap_drift": _drift(record, "rank_correlation_previous"),
        "gmar/heatmap_drift_from_first": _drift(record, "rank_correlation_first"),
        "gmar/compute_seconds": float(record["seconds"]),
    }
    for layer in range(len(heads)):
        found[f"gmar_layers/effective_heads_L{layer:02d}"] = float(effective[layer])
        found[f"gmar_layers/importance_L{layer:02d}"] = _sum(importance[layer])
        found[f"gmar_layers/entropy_L{layer:02d}"] = _mean(entropy[layer])
    if per_head:
        found.update({name: float(relative[cell]) for name, cell in _per_head(heads)})
    tried = record.get("faithfulness") or {}
    found.update({name: np.nan if value is None else float(value) for name, value in tried.items()})
    return found


def as_metrics(record: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The numbers that other callbacks may monitor, for `trainer.callback_metrics`."""
    heads = [int(np.isfinite(row).sum()) for row in record["importance"]]
    found = scalars(record, heads)
    return {
        name: torch.tensor(value)
        for name, value in found.items()
        if name.startswith("gmar/") and math.isfinite(value)
    }


def hidden_names(heads: Sequence[int]) -> frozenset[str]:
    """Names of the numbers per head: too many for a panel each."""
    return frozenset(name for name, _ in _per_head(heads))


def effective_heads(shares: np.ndarray) -> np.ndarray:
    """How many heads share a layer's importance: the exponential of the entropy of the shares, `(layers,)`."""
    safe = np.where(shares > 0, shares, 1.0)
    effective = np.exp(-(safe * np.log(safe)).sum(-1))
    return np.where(np.isfinite(shares).any(-1), effective, np.nan)


def captions(
    record: Mapping[str, Any], labels: Sequence[int] | None, names: Sequence[str] | None
) -> list[str]:
    """`#3 cat -> dog p=.81 · step 1200` for each probe image."""
    lines = []
    for index, (prediction, p) in enumerate(zip(record["predictions"], record["probabilities"], strict=True)):
        truth = f"{_named(labels[index], names)} → " if labels is not None else ""
        p = 0.0 if p is None else p
        lines.append(f"#{index} {truth}{_named(prediction, names)} p={p:.2f} · step {record['step']}")
    return lines


def image_rows(
    record: Mapping[str, Any], labels: Sequence[int] | None, names: Sequence[str] | None
) -> list[dict[str, Any]]:
    """What is known of each probe image at a probe: a row of a table.

    Returns:
        `image` (its index), `label`, `prediction`, `probability`, `score`, `drift`, `drift_from_first`; None
        where a value is missing. Drift is 1 minus the rank correlation of the maps.
    """
    drift, scores = record.get("drift") or {}, record.get("scores") or []
    rows = []
    for index, prediction in enumerate(record["predictions"]):
        rows.append(
            {
                "image": index,
                "label": None if labels is None else _named(labels[index], names),
                "prediction": _named(prediction, names),
                "probability": record["probabilities"][index],
                "score": scores[index] if index < len(scores) else None,
                "drift": _unlikeness(drift.get("rank_correlation_previous"), index),
                "drift_from_first": _unlikeness(drift.get("rank_correlation_first"), index),
            }
        )
    return rows


def pictures(history: History, heatmaps: np.ndarray, images: Sequence[np.ndarray]) -> dict[str, Any]:
    """Overlays and grids of the last probe, as the fields of a `Publication`.

    Args:
        history: The record, whose last line is this probe.
        heatmaps: `(images, grid_h, grid_w)`.
        images: The clean photographs to draw on, uint8; as many as are drawn.

    Returns:
        `heatmaps`, `grids` and `importance` of a `Publication`.
    """
    record, shares = history.records[-1], history.shares()
    on_grid = heatmaps.ndim == 3
    return {
        "heatmaps": [overlay(image, heatmaps[index]) for index, image in enumerate(images)]
        if on_grid
        else [],
        "grids": {
            "gmar/head_importance": importance_grid(shares[-1], record["flagged"], history.layers),
            "gmar/head_evolution": evolution_raster(shares, history.steps, history.events, history.layers),
        },
        "importance": relative_shares(shares[-1]).ravel(),
    }


def _table(rows: Any, heads: Sequence[int]) -> np.ndarray:
    table = np.full((len(heads), max(heads, default=0)), np.nan)
    for layer, row in enumerate([] if rows is None else rows):
        table[layer, : heads[layer]] = [np.nan if cell is None else cell for cell in row[: heads[layer]]]
    return table


def _drift(record: Mapping[str, Any], name: str) -> float:
    values = [value for value in (record.get("drift") or {}).get(name, []) if value is not None]
    return 1.0 - _mean(np.array(values, dtype=np.float64))


def _unlikeness(correlations: Sequence[float | None] | None, index: int) -> float | None:
    value = correlations[index] if correlations and index < len(correlations) else None
    return None if value is None else 1.0 - value


def _per_head(heads: Sequence[int]) -> list[tuple[str, tuple[int, int]]]:
    return [
        (f"gmar_heads/L{layer:02d}_H{head:02d}", (layer, head))
        for layer, count in enumerate(heads)
        for head in range(count)
    ]


def _named(index: int, names: Sequence[str] | None) -> str:
    return str(names[index]) if names is not None and 0 <= index < len(names) else str(index)


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else float("nan")


def _sum(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.sum()) if finite.size else float("nan")
