"""What the report embeds of one run: numbers and maps in few bytes, thinned until they fit.

Everything is JSON. Tables and maps are base64 of whole numbers, `page/data.js` is their reader:

- shares: 16 bits, 65535 where nothing was measured;
- signals: 8 bits between `low` and `high` of the run, 255 where nothing was measured; with `root` the square root
  is stored, so that weak heads keep two digits;
- maps of the primary form: 8 bits, 255 where not finite; of the other forms and of single heads: 4 bits, 15 where
  not finite. Each map is scaled by itself.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from gmar_lightning.monitor.history import History
from gmar_lightning.monitor.record import ProbeRecord
from gmar_lightning.show.codec import at_most, base64_of, nibbles, quantised
from gmar_lightning.show.evidence import evidence_lines
from gmar_lightning.show.grids import short_names
from gmar_lightning.show.head_cards import embedded_head_maps
from gmar_lightning.show.metric_names import accuracy_name, loss_name
from gmar_lightning.show.verdict import ALARMS, judge

_PHOTO_SIDE = 176
# A finer grid is averaged down to this: a photograph of 176 pixels shows no more.
_GRID_SIDE = 24
_MISSING_SHARE = 65535
_MISSING = 255
# Part of the file that maps of single heads may take.
_HEAD_MAPS_PART = 0.25
# Signals with a natural end; the others end at the largest value of the run. None: the diagonal of the grid.
_HIGHEST: Mapping[str, float | None] = {
    "entropy": 1.0,
    "sink_mass": 1.0,
    "agreement": 1.0,
    "similarity": 1.0,
    "token_similarity": 1.0,
    "distance": None,
}
# Spread over orders of magnitude within one model.
_BY_ROOT = frozenset({"contribution", "gradient_norm"})
# Importance is embedded as shares; an index is no quantity.
_LEFT_OUT = frozenset({"importance", "shares", "sink_token"})


def fitted_run(history: History, name: str, limit: int) -> dict[str, Any]:
    """The run's data with as many probes, evenly chosen, as `limit` characters hold.

    Args:
        history: The run.
        name: Shown for it.
        limit: Characters of JSON.
    """
    total = len(history.records)
    made: dict[int, dict[str, Any]] = {}
    run = _run_data(history, name, limit)

    def with_probes(count: int) -> tuple[dict[str, Any], int]:
        chosen = np.unique(np.linspace(0, total - 1, count).round().astype(int)).tolist() if total else []
        for index in chosen:
            made.setdefault(index, _probe_data(history, history.records[index], run))
        full = {**run, "probes": [made[index] for index in chosen]}
        return full, len(embedded(full))

    fixed = len(embedded(run))
    # a few probes tell the size of all: a long record is not read to the end only to be left out
    keep = min(total, 5)
    full, size = with_probes(keep)
    if keep:
        keep = max(2, min(total, int((limit - fixed) / ((size - fixed) / keep))))
        full, size = with_probes(keep)
    while size > limit and keep > 2:
        keep = max(2, min(keep - 1, int(keep * (limit - fixed) / (size - fixed))))
        full, size = with_probes(keep)
    return full


def embedded(data: Any) -> str:
    """JSON that no browser can mistake for markup, whatever the class names are."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _run_data(history: History, name: str, limit: int) -> dict[str, Any]:
    verdict = judge(history)
    segments = [segment["segment"] for segment in history.run["segments"]]
    return {
        "name": name,
        "layers": history.layers,
        "rows": short_names(history.layers) if history.layers else [],
        "heads": history.heads,
        "total": len(history.records),
        "forms": _forms(history),
        "signals": _signal_ranges(history),
        "settings": _settings(history),
        "fingerprints": {str(n): str(history.segment_run(n).get("fingerprint")) for n in segments},
        "images": {str(number): _photos(history, number) for number in segments},
        "classes": history.run.get("class_names"),
        "labels": {str(number): _labels(history, number) for number in segments},
        "accuracy": accuracy_name(history),
        "loss": loss_name(history),
        "verdict": {
            "headline": verdict.headline,
            "healthy": verdict.healthy,
            "findings": [
                {"kind": f.kind, "text": f.text, "alarm": f.kind in ALARMS} for f in verdict.findings
            ],
        },
        "evidence": evidence_lines(history),
        "events": history.events,
        "head_maps": embedded_head_maps(history, int(_HEAD_MAPS_PART * limit)),
    }


def _settings(history: History) -> dict[str, str]:
    said = {"explained": history.run.get("explained"), **(history.run.get("settings") or {})}
    return {key: str(value) for key, value in said.items()}


def _probe_data(history: History, record: ProbeRecord, run: Mapping[str, Any]) -> dict[str, Any]:
    metrics = {kind: record.metrics.get(run[kind]) for kind in ("accuracy", "loss") if run[kind]}
    shown: dict[str, Any] = {
        "step": record.step,
        "epoch": record.epoch,
        "failure": record.failure,
        "segment": str(record.segment),
        "metrics": {kind: _short(value) for kind, value in metrics.items() if value is not None},
    }
    if record.importance is None:
        return shown
    count = int(history.segment_run(record.segment).get("num_heatmaps") or 0)
    drift = record.drift or {}
    return shown | {
        "shares": base64_of(
            quantised(history.table(record, "shares"), 0.0, 1.0, _MISSING_SHARE).astype("<u2")
        ),
        "totals": [_short(total) for total in np.nansum(history.table(record, "importance"), axis=1)],
        "signals": {
            name: base64_of(_coded(history, record, name, scale))
            for name, scale in run["signals"].items()
            if name in record.signals
        },
        "flagged": [list(cell) for cell in record.flagged],
        "predictions": list(record.predictions[:count]),
        "probabilities": [_short(p) for p in record.probabilities[:count]],
        "scores": [_short(score) for score in record.scores[:count]],
        "previous": _short(_median(drift.get("rank_correlation_previous"))),
        "correlation": [_short(v) for v in drift.get("rank_correlation_first", ())][:count],
        "overlap": [_short(v) for v in drift.get("top20_overlap_first", ())][:count],
        "faithfulness": {key: _short(value) for key, value in (record.faithfulness or {}).items()},
        "maps": _maps(history, record, run["forms"], count),
    }


def _forms(history: History) -> list[str]:
    """Forms of the rollout that are kept of any probe that is looked at, the primary one first."""
    found: dict[str, None] = {}
    stored = [record for record in history.records if record.stored_maps]
    for record in stored[:1] + stored[-1:]:
        found.update(dict.fromkeys(history.maps_of(record)))
    return list(found)


def _signal_ranges(history: History) -> dict[str, dict[str, Any]]:
    good = [record for record in history.records if record.importance is not None]
    names = dict.fromkeys(name for record in good for name in record.signals if name not in _LEFT_OUT)
    ranges = {}
    for name in names:
        if name == "contribution_signed":
            # as part of the unsigned contribution: 1 for the class in every image, -1 against it
            ranges[name] = {"low": -1, "high": 1, "root": False}
            continue
        highest = _HIGHEST.get(name, math.nan)
        if highest is None:
            # no two patches are further apart than the corners of the grid
            highest = math.hypot(*(history.run.get("grid") or (1, 1)))
        if math.isnan(highest):
            highest = max(
                (_highest(record.signals[name]) for record in good if name in record.signals), default=0.0
            )
        ranges[name] = {"low": 0, "high": float(f"{highest:.4g}"), "root": name in _BY_ROOT}
    return ranges


def _highest(table: np.ndarray) -> float:
    known = table[np.isfinite(table)]
    return float(known.max()) if known.size else 0.0


def _coded(history: History, record: ProbeRecord, name: str, scale: Mapping[str, Any]) -> np.ndarray:
    table = history.table(record, name).astype(np.float64)
    if name == "contribution_signed" and "contribution" in record.signals:
        whole = history.table(record, "contribution")
        table = np.divide(table, whole, out=np.zeros_like(table), where=whole > 0)
    values = quantised(table, scale["low"], scale["high"], _MISSING, root=scale["root"])
    return values.astype(np.uint8)


def _maps(history: History, record: ProbeRecord, forms: Sequence[str], count: int) -> dict[str, Any] | None:
    maps = {form: value[:count] for form, value in history.maps_of(record).items() if value.ndim == 3}
    if not maps or not count:
        return None
    coded = {form: _unit_maps(value) for form, value in maps.items()}
    first = next(iter(coded.values()))
    return {
        "h": first.shape[1],
        "w": first.shape[2],
        "forms": {form: base64_of(_packed_form(unit, form == forms[0])) for form, unit in coded.items()},
    }


def _packed_form(unit: np.ndarray, primary: bool) -> np.ndarray:
    return quantised(unit, 0.0, 1.0, _MISSING).astype(np.uint8) if primary else nibbles(unit)


def _unit_maps(maps: np.ndarray) -> np.ndarray:
    """Each map between its own extremes, 0 to 1, on a grid of at most 24 patches a side; NaN stays."""
    maps = np.stack([at_most(one, _GRID_SIDE) for one in maps.astype(np.float64)])
    known = np.isfinite(maps)
    low = np.where(known, maps, np.inf).min(axis=(1, 2), keepdims=True)
    high = np.where(known, maps, -np.inf).max(axis=(1, 2), keepdims=True)
    # a map that is flat but for rounding (its own and that of 8 bits) stays without colour
    flat = ~(high - low > 2e-3 * np.maximum(np.abs(low), np.abs(high)))
    spread = np.where(flat, 1.0, high - low)
    with np.errstate(invalid="ignore"):
        return np.where(known, np.where(flat, 0.0, (maps - low) / spread), np.nan)


def _photos(history: History, segment: int) -> list[dict[str, Any]]:
    photos = []
    for path in history.input_paths(segment):
        with Image.open(path) as photo:
            photo = photo.convert("RGB")
            photo.thumbnail((_PHOTO_SIDE, _PHOTO_SIDE))
            buffer = io.BytesIO()
            photo.save(buffer, "JPEG", quality=80, optimize=True)
            photos.append({"w": photo.width, "h": photo.height, "data": base64_of(buffer.getvalue())})
    return photos


def _labels(history: History, segment: int) -> list[int] | None:
    run = history.segment_run(segment)
    labels = run.get("labels")
    return None if labels is None else labels[: run.get("num_heatmaps") or len(labels)]


def _median(values: np.ndarray | None) -> float | None:
    known = np.asarray([] if values is None else values, dtype=np.float64)
    known = known[np.isfinite(known)]
    return float(np.median(known)) if known.size else None


def _short(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else float(f"{value:.4g}")
