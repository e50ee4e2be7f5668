"""One self-contained interactive HTML file from the records of one or several runs."""

import base64
import html
import io
import json
import math
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gmar_lightning.monitor.history import History
from gmar_lightning.monitor.record import ProbeRecord
from gmar_lightning.show.colour import HEAT
from gmar_lightning.show.grids import short_names
from gmar_lightning.show.metric_names import accuracy_name, loss_name
from gmar_lightning.show.verdict import ALARMS, judge
from gmar_lightning.version import __version__

# one megabyte for a run, two for a comparison, less what numbers may still grow by
_LIMIT_ONE, _LIMIT_SEVERAL = 980_000, 1_960_000
_PHOTO_SIDE = 176
_GRID_SIDE = 24
_MISSING_SHARE = 65535
_MISSING_HEAT = 255


def write_report(dirs: Sequence[str | Path] | str | Path, out: str | Path | None = None) -> Path:
    """Write the report of one run, or of several side by side.

    Of long runs, probes are left out evenly until the file has at most one megabyte (two for several runs);
    the page says so.

    Args:
        dirs: folder of one record, or several.
        out: the file; by default `report.html` in the first folder.

    Returns:
        Path of the file.

    Raises:
        FileNotFoundError: a folder holds no record.
        ValueError: no folder given, or a record is unreadable.
    """
    folders = [Path(dirs)] if isinstance(dirs, (str, Path)) else [Path(folder) for folder in dirs]
    if not folders:
        raise ValueError("a report needs at least one folder")
    histories = [History.load(folder) for folder in folders]
    path = Path(out) if out is not None else folders[0] / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(render_report(histories, run_names(folders)), encoding="utf-8")
    partial.replace(path)
    return path


def render_report(histories: Sequence[History], names: Sequence[str]) -> str:
    """The report as HTML text; `names` are shown for the runs."""
    template = files("gmar_lightning.show").joinpath("report.html").read_text(encoding="utf-8")
    limit = _LIMIT_ONE if len(histories) == 1 else _LIMIT_SEVERAL
    share = (limit - len(template)) // len(histories)
    runs = [_fitted(history, name, share) for history, name in zip(histories, names, strict=True)]
    data = {"version": __version__, "heat": _base64(HEAT.tobytes()), "runs": runs}
    title = html.escape(f"GMAR report: {', '.join(names)}")
    # the template is split, not formatted: what a user wrote must not be taken for a placeholder
    head, rest = template.split("{{title}}")
    middle, tail = rest.split("{{data}}")
    return head + title + middle + _embedded(data) + tail


def run_names(folders: Sequence[Path]) -> list[str]:
    """Shortest endings of the paths that tell the runs apart; a last part `gmar` is left out."""
    parts = [folder.resolve().parts[1:] or ("run",) for folder in folders]
    parts = [p[:-1] if p[-1] == "gmar" and len(p) > 1 else p for p in parts]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(p[-1:])} ({number})" for number, p in enumerate(parts, start=1)]


def _fitted(history: History, name: str, limit: int) -> dict[str, Any]:
    """The run's data with as many probes, evenly chosen, as `limit` characters hold."""
    total = len(history.records)
    made: dict[int, dict[str, Any]] = {}
    run = _run_data(history, name)

    def with_probes(count: int) -> tuple[dict[str, Any], int]:
        chosen = np.unique(np.linspace(0, total - 1, count).round().astype(int)).tolist() if total else []
        for index in chosen:
            made.setdefault(index, _probe_data(history, index))
        full = {**run, "probes": [made[index] for index in chosen]}
        return full, len(_embedded(full))

    fixed = len(_embedded(run))
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


def _run_data(history: History, name: str) -> dict[str, Any]:
    verdict = judge(history)
    segments = [segment["segment"] for segment in history.run["segments"]]
    return {
        "name": name,
        "layers": history.layers,
        "rows": short_names(history.layers) if history.layers else [],
        "heads": history.heads,
        "total": len(history.records),
        "distance_top": _short(_distance_top(history)),
        "settings": {key: str(value) for key, value in (history.run.get("settings") or {}).items()},
        "fingerprint": str(history.run.get("fingerprint")),
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
        "events": history.events,
    }


def _probe_data(history: History, index: int) -> dict[str, Any]:
    record = history.records[index]
    names = {"accuracy": accuracy_name(history), "loss": loss_name(history)}
    shown: dict[str, Any] = {
        "step": record.step,
        "epoch": record.epoch,
        "error": record.failure,
        "segment": str(record.segment),
        "metrics": {kind: _short(record.metrics.get(name)) for kind, name in names.items() if name},
    }
    if record.importance is None:
        return shown
    count = int(history.segment_run(record.segment).get("num_heatmaps") or 0)
    totals = np.nansum(history.table(record, "importance"), axis=1)
    drift = record.drift or {}
    shown |= {
        "shares": _base64(
            _quantised(history.table(record, "shares"), 1.0, _MISSING_SHARE).astype("<u2").tobytes()
        ),
        "totals": [_short(total) for total in totals],
        "flagged": [list(cell) for cell in record.flagged],
        "predictions": list(record.predictions[:count]),
        "probabilities": [_short(p) for p in record.probabilities[:count]],
        "previous": _short(_median(drift.get("rank_correlation_previous"))),
        "correlation": [_short(v) for v in drift.get("rank_correlation_first", ())],
        "overlap": [_short(v) for v in drift.get("top20_overlap_first", ())],
        "maps": _maps(history, record),
    }
    for key, top in (("entropy", 1.0), ("distance", _distance_top(history))):
        if key in record.signals:
            values = _quantised(history.table(record, key), top, 255)
            shown[key] = _base64(values.astype(np.uint8).tobytes())
    return shown


def _distance_top(history: History) -> float:
    # no two patches are further apart than the corners of the grid
    return math.hypot(*(history.run.get("grid") or (1, 1)))


def _maps(history: History, record: ProbeRecord) -> dict[str, Any] | None:
    maps = next(iter(history.maps_of(record).values()), None)
    if maps is None or not maps.size:
        return None
    maps = np.stack([_at_most(one, _GRID_SIDE) for one in maps.astype(np.float64)])
    low = np.nanmin(np.where(np.isfinite(maps), maps, np.inf), axis=(1, 2), keepdims=True)
    high = np.nanmax(np.where(np.isfinite(maps), maps, -np.inf), axis=(1, 2), keepdims=True)
    # the same noise floor as in the drawn overlays: a constant map stays without colour
    flat = ~(high - low > 2e-3 * np.maximum(np.abs(low), np.abs(high)))
    with np.errstate(invalid="ignore"):
        unit = np.where(
            flat, np.where(np.isfinite(maps), 0.0, np.nan), (maps - low) / np.where(flat, 1, high - low)
        )
    heat = _quantised(unit, 1.0, _MISSING_HEAT).astype(np.uint8)
    return {"h": heat.shape[1], "w": heat.shape[2], "data": _base64(heat.tobytes())}


def _at_most(grid: np.ndarray, side: int) -> np.ndarray:
    if max(grid.shape) <= side:
        return grid
    size = [max(1, round(n * side / max(grid.shape))) for n in (grid.shape[1], grid.shape[0])]
    return np.asarray(
        Image.fromarray(grid.astype(np.float32)).resize((size[0], size[1]), Image.Resampling.BOX)
    )


def _photos(history: History, segment: int) -> list[dict[str, Any]]:
    photos = []
    for path in history.input_paths(segment):
        with Image.open(path) as photo:
            photo = photo.convert("RGB")
            photo.thumbnail((_PHOTO_SIDE, _PHOTO_SIDE))
            buffer = io.BytesIO()
            photo.save(buffer, "JPEG", quality=80, optimize=True)
            photos.append({"w": photo.width, "h": photo.height, "data": _base64(buffer.getvalue())})
    return photos


def _labels(history: History, segment: int) -> list[int] | None:
    run = history.segment_run(segment)
    labels = run.get("labels")
    return None if labels is None else labels[: run.get("num_heatmaps") or len(labels)]


def _quantised(values: np.ndarray, top: float, missing: int) -> np.ndarray:
    finite = np.isfinite(values)
    scaled = np.clip(np.where(finite, values, 0.0) / top, 0, 1) * (missing - 1)
    return np.where(finite, scaled.round(), missing)


def _median(values: np.ndarray | None) -> float | None:
    known = np.empty(0) if values is None else values[np.isfinite(values)]
    return float(np.median(known)) if known.size else None


def _short(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else float(f"{value:.4g}")


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def _embedded(data: Any) -> str:
    """JSON that no browser can mistake for markup, whatever the class names are."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
