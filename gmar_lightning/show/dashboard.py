"""One record to numbers and pictures, under the names of `show.keys`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from gmar_lightning.monitor.history import History
from gmar_lightning.monitor.record import ProbeRecord, effective_heads, head_counts
from gmar_lightning.show import keys
from gmar_lightning.show.grids import (
    contribution_grid,
    contribution_raster,
    evolution_raster,
    importance_grid,
    relative_shares,
)
from gmar_lightning.show.head_cards import healthy_sibling, last_healthy, raised
from gmar_lightning.show.head_pictures import head_picture
from gmar_lightning.show.render import overlay

# Pictures of more heads at once say less than the grid does.
_MOST_FLAGGED = 8


def scalars(record: ProbeRecord, heads: Sequence[int], per_head: bool = False) -> dict[str, float]:
    """The numbers of one probe, always under the same names.

    Args:
        record: The probe.
        heads: Heads of each layer.
        per_head: Also one number per head.

    Returns:
        Name to number, NaN where there is none.
    """
    shape = len(heads), max(heads, default=0)
    nothing = np.full(shape, np.nan)
    importance, shares = (nothing if table is None else table for table in (record.importance, record.shares))
    entropy = record.signals.get("entropy", nothing)
    relative, effective = relative_shares(shares), effective_heads(shares)
    numbers = {
        keys.COLLAPSED: float(len(record.flagged)),
        keys.NEWLY_COLLAPSED: float(record.newly_collapsed),
        keys.EFFECTIVE_HEADS: _mean(effective),
        keys.IMPORTANCE_MIN: float(np.nanmin(relative)) if np.isfinite(relative).any() else np.nan,
        keys.ENTROPY: _mean(entropy),
        keys.DRIFT: _drift(record, "rank_correlation_previous"),
        keys.DRIFT_FROM_FIRST: _drift(record, "rank_correlation_first"),
        keys.SECONDS: record.seconds,
    }
    if record.source == "step":
        # no pictures, no forward of its own: what there never is gets no column
        for name in (keys.ENTROPY, keys.DRIFT, keys.DRIFT_FROM_FIRST, keys.SECONDS):
            del numbers[name]
    for layer in range(len(heads)):
        numbers[keys.LAYER_EFFECTIVE_HEADS.format(layer=layer)] = float(effective[layer])
        numbers[keys.LAYER_IMPORTANCE.format(layer=layer)] = _sum(importance[layer])
        if record.source == "probe":
            numbers[keys.LAYER_ENTROPY.format(layer=layer)] = _mean(entropy[layer])
    if per_head:
        numbers.update({name: float(relative[cell]) for name, cell in keys.head_names(heads)})
    for name, value in (record.faithfulness or {}).items():
        numbers[keys.test_of_maps(name)] = value
    return {keys.of_source(name, record.source): number for name, number in numbers.items()}


def as_metrics(record: ProbeRecord) -> dict[str, torch.Tensor]:
    """The numbers that other callbacks may monitor, for `trainer.callback_metrics`."""
    heads = [] if record.importance is None else head_counts(record.importance)
    return {
        name: torch.tensor(value)
        for name, value in scalars(record, heads).items()
        if name.startswith(("gmar/", "gmar_step/")) and math.isfinite(value)
    }


def captions(
    record: ProbeRecord,
    labels: Sequence[int] | None,
    names: Sequence[str] | None,
    image_names: Sequence[str] | None = None,
) -> list[str]:
    """`#3 cat → dog p=0.81 · step 1200` for each probe image; its name stands behind the number if it has one.

    Where it is not known what a score says of the probability, it stands in its place, `score=2.3`.
    """
    if not record.predictions:
        return [
            f"#{index}{_called(image_names, index)} score={score:.3g} · step {record.step}"
            for index, score in enumerate(record.scores)
        ]
    lines = []
    for index, (prediction, p) in enumerate(zip(record.predictions, record.probabilities, strict=True)):
        truth = f"{_named(labels[index], names)} → " if labels is not None else ""
        said = f" p={p:.2f}"
        if math.isnan(p):
            said = f" score={record.scores[index]:.3g}" if record.scores else ""
        called = _called(image_names, index)
        lines.append(f"#{index}{called} {truth}{_named(prediction, names)}{said} · step {record.step}")
    return lines


def image_rows(
    record: ProbeRecord,
    labels: Sequence[int] | None,
    names: Sequence[str] | None,
    image_names: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """What is known of each probe image at a probe: a row of a table.

    Returns:
        `image` (its name, or else its index), `label`, `prediction`, `probability`, `score`, `drift`,
        `drift_from_first`; None where a value is missing. Drift is 1 minus the rank correlation of the maps.
    """
    return [
        {
            "image": index if image_names is None else image_names[index],
            "label": None if labels is None else _named(labels[index], names),
            "prediction": _named(record.predictions[index], names) if record.predictions else None,
            "probability": _known(record.probabilities[index]) if record.predictions else None,
            "score": score,
            "drift": _unlikeness(record, "rank_correlation_previous", index),
            "drift_from_first": _unlikeness(record, "rank_correlation_first", index),
        }
        for index, score in enumerate(record.scores)
    ]


def pictures(
    history: History, record: ProbeRecord, images: Sequence[np.ndarray], rollouts: Sequence[str] = ()
) -> dict[str, Any]:
    """Overlays and grids of the last probe, as the fields of a `Publication`.

    Args:
        history: The run so far.
        record: The probe, with its maps.
        images: The clean photographs to draw on, uint8; as many as are drawn.
        rollouts: Forms of the map to draw beside the primary one.

    Returns:
        `heatmaps`, `others`, `grids` and `importance` of a `Publication`.
    """
    shares = history.shares()
    return {
        "heatmaps": _overlays(images, record.heatmaps),
        "others": {f"{keys.HEATMAPS}_{form}": _overlays(images, record.maps.get(form)) for form in rollouts},
        "grids": {
            keys.HEAD_IMPORTANCE: importance_grid(shares[-1], record.flagged, history.layers),
            keys.HEAD_EVOLUTION: evolution_raster(shares, history.steps, history.events, history.layers),
            **_contributions(history, record),
        },
        "importance": relative_shares(shares[-1]).ravel(),
    }


def _overlays(images: Sequence[np.ndarray], maps: np.ndarray | None) -> list[np.ndarray]:
    # Relevance per token of a sequence is no picture.
    grids = maps if maps is not None and maps.ndim == 3 else ()
    return [overlay(image, grid) for image, grid in zip(images, grids, strict=False)]


def _contributions(history: History, record: ProbeRecord) -> dict[str, np.ndarray]:
    if "contribution" not in record.signals:
        return {}
    values = history.contribution()
    # one scale for the whole run so far, or a grid that pales would say that all heads lost their part
    known = values[np.isfinite(values)]
    top = float(known.max()) if known.size else None
    return {
        keys.HEAD_CONTRIBUTION: contribution_grid(values[-1], record.flagged, history.layers, top),
        keys.CONTRIBUTION_EVOLUTION: contribution_raster(
            values, history.steps, history.events, history.layers, top
        ),
    }


def flagged_heads(
    history: History, record: ProbeRecord, images: Sequence[np.ndarray]
) -> dict[str, np.ndarray]:
    """What each newly flagged head attends to: before its flag, now, and beside a healthy head of its layer.

    Args:
        history: The run so far, this probe included.
        record: The probe, with its maps of heads.
        images: The clean photographs, uint8.

    Returns:
        Logged name to picture, of at most eight heads.
    """
    now, drawn = record.head_maps, {}
    if now is None or not len(images):
        return {}
    for event in raised(record.events)[:_MOST_FLAGGED]:
        layer, head = int(event.layer or 0), int(event.head or 0)
        healthy = last_healthy(history.records, event, history.records[-1].segment)
        before = None if healthy is None else history.head_maps_of(healthy)
        sibling = healthy_sibling(record, layer, head)
        titles = (
            f"head {head} of {event.layer_name} before, step {healthy.step if healthy else '-'}",
            f"head {head} at step {record.step}: {event.kind.replace('_', ' ')}",
            f"head {sibling} of the same layer",
        )
        name = keys.FLAGGED_HEAD.format(layer=layer, head=head)
        drawn[name] = head_picture(images, now, before, layer, head, sibling, titles)
    return drawn


def summary(history: History) -> Mapping[str, Any]:
    """What a run came to: heads flagged now and ever, when the first collapsed, which is weakest."""
    good = [record for record in history.records if record.importance is not None]
    collapses = [event for record in history.records for event in record.events if event.kind == "collapsed"]
    numbers: dict[str, Any] = {
        keys.COLLAPSED_FINAL: len(good[-1].flagged) if good else 0,
        keys.COLLAPSED_EVER: len({(event.layer, event.head) for event in collapses}),
    }
    if collapses:
        numbers[keys.FIRST_COLLAPSE] = collapses[0].step
    shares = good[-1].shares if good else None
    if shares is not None and np.isfinite(shares).any():
        layer, head = np.unravel_index(np.nanargmin(shares), shares.shape)
        numbers[keys.WORST_HEAD] = f"{history.layers[layer]} head {head}"
        numbers[keys.WORST_SHARE] = float(np.nanmin(relative_shares(shares)))
    numbers.update(_last_measured(good))
    return numbers


def _last_measured(good: Sequence[ProbeRecord]) -> dict[str, float]:
    """How far the maps moved from those of the untrained or pretrained model, and how good they are."""
    numbers = {}
    # The first probe is the model as it came only when no optimizer step was taken before it.
    if (
        good
        and good[0].global_step == 0
        and math.isfinite(drift := _drift(good[-1], "rank_correlation_first"))
    ):
        numbers[keys.DRIFT_FROM_PRETRAINED] = drift
    wanted = {keys.FAITHFULNESS: "insertion_minus_deletion", keys.CLASS_SENSITIVITY: "class_sensitivity"}
    for key, name in wanted.items():
        values = [(record.faithfulness or {}).get(name, math.nan) for record in good]
        measured = [value for value in values if math.isfinite(value)]
        if measured:
            numbers[key] = measured[-1]
    return numbers


def _drift(record: ProbeRecord, name: str) -> float:
    return 1.0 - _mean(np.asarray((record.drift or {}).get(name, ()), dtype=np.float64))


def _unlikeness(record: ProbeRecord, name: str, index: int) -> float | None:
    return 1.0 - float(record.drift[name][index]) if record.drift and name in record.drift else None


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _called(image_names: Sequence[str] | None, index: int) -> str:
    return "" if image_names is None else f" {image_names[index]}"


def _named(index: int, names: Sequence[str] | None) -> str:
    return str(names[index]) if names is not None and 0 <= index < len(names) else str(index)


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean(dtype=np.float64)) if finite.size else float("nan")


def _sum(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.sum(dtype=np.float64)) if finite.size else float("nan")
