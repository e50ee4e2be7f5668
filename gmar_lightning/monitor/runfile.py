"""`run.json`, which says once what all probes of a run share, and the folder that it stands in."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gmar_lightning.monitor.disk import write_atomically
from gmar_lightning.monitor.record import FORMAT, ProbeRecord, finite_only, head_counts

_RECORD_PARTS = ("run.json", "history.jsonl", "inputs", "maps", "head_maps", "heatmaps", "report.html")


class OtherModelError(ValueError):
    """A probe of a model with other layers or heads than the record's."""


def read_run(folder: Path) -> dict[str, Any]:
    """The content of `run.json`.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is unreadable, or written by a newer version of this package.
    """
    path = folder / "run.json"
    if not path.is_file():
        raise FileNotFoundError(f"no GMAR record in {folder}: run.json is missing")
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(run, dict) or run.get("format") not in (1, FORMAT):
        raise ValueError(f"{path} is not a record of format 1 or {FORMAT}")
    return run


def write_run(folder: Path, run: Mapping[str, Any]) -> None:
    """Replace `run.json` at once; what JSON does not know is written as text."""
    text = json.dumps(finite_only(run), ensure_ascii=False, indent=1, allow_nan=False, default=str)
    write_atomically(folder / "run.json", text.encode())


def with_first_segment(run: Mapping[str, Any]) -> dict[str, Any]:
    """A run with every entry that a record has from its beginning."""
    first = {"segment": 0, "fingerprint": run.get("fingerprint"), "from_step": 0}
    return {"format": FORMAT, "layers": [], "heads": [], "segments": [first], **run}


def model_entries(record: ProbeRecord) -> dict[str, Any]:
    """What only the first probe shows of the model: layers, heads of each, grid of the maps, what is explained."""
    assert record.importance is not None
    entries: dict[str, Any] = {"layers": list(record.layers), "heads": head_counts(record.importance)}
    if record.classes:
        entries["explained"] = record.classes
    if record.heatmaps is not None:
        entries["grid"] = list(record.heatmaps.shape[1:])
    return entries


def check_next(record: ProbeRecord, before: Sequence[ProbeRecord], layers: int) -> None:
    """Refuse a probe that cannot follow those before it.

    Raises:
        ValueError: It does not come after the last one, or it comes from another source.
        OtherModelError: It has other layers or heads than the run (0 layers while that is not known).
    """
    if before and record.position <= before[-1].position:
        raise ValueError(
            f"probe at global_step {record.global_step} does not come after the last recorded one "
            f"({before[-1].global_step}); rewind the record first"
        )
    if before and record.source != before[-1].source:
        raise ValueError(
            f"a record of {before[-1].source}s takes no {record.source}: the two are not comparable"
        )
    for name, table in record.signals.items():
        if layers and len(table) != layers:
            raise OtherModelError(f"{name} has {len(table)} layers, the run has {layers}")
    known = next((r.importance.shape for r in reversed(before) if r.importance is not None), None)
    if known is not None and record.importance is not None and record.importance.shape != known:
        raise OtherModelError(f"(layers, heads) are {record.importance.shape}, the run has {known}")


def write_run_again(folder: Path, run: Mapping[str, Any]) -> None:
    """Write `run.json` where somebody deleted the record while the run goes on."""
    if not (folder / "run.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_run(folder, run)
        warnings.warn(
            f"GMARCallback: {folder} was deleted in mid-run; the record goes on there without the probes before",
            RuntimeWarning,
            stacklevel=2,
        )


def run_of_other_model(run: Mapping[str, Any], segment: int) -> dict[str, Any]:
    """What a new record says that goes on with the run's present probe images and another model."""
    model = ("layers", "heads", "grid")
    present = [entry for entry in run["segments"] if entry["segment"] == segment]
    return {
        **{name: value for name, value in run.items() if name not in model},
        "segments": [
            {name: value for name, value in entry.items() if name not in model} for entry in present
        ],
    }


def move_aside(folder: Path) -> None:
    """Move the record in a folder, if there is one, to `previous_01` (then 02, ...) in it."""
    if not (folder / "run.json").exists():
        return
    number = 1 + max((int(path.name[9:]) for path in folder.glob("previous_[0-9]*")), default=0)
    target = folder / f"previous_{number:02d}"
    target.mkdir()
    for name in _RECORD_PARTS:
        if (folder / name).exists():
            (folder / name).rename(target / name)
