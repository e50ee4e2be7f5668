"""A run as plain values for programs: what `gmar report --json` prints. Its schema is `docs/report.schema.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gmar_lightning.monitor.history import History
from gmar_lightning.monitor.record import FORMAT, ProbeRecord, finite_only
from gmar_lightning.show.dashboard import summary
from gmar_lightning.show.metric_names import accuracy_name, loss_name
from gmar_lightning.show.verdict import ALARMS, FINDINGS, judge

SCHEMA = 1


def describe(history: History, name: str, around: int | None = None, window: int = 3) -> dict[str, Any]:
    """Verdict, findings, events, head cards, faithfulness and paths of a run.

    Args:
        history: The run.
        name: What to call it.
        around: Also the probes next to this step, in full.
        window: How many probes before and after it.

    Raises:
        ValueError: `around` lies outside of the run.
    """
    verdict = judge(history)
    described: dict[str, Any] = {
        "schema": SCHEMA,
        "name": name,
        "version": history.run.get("version"),
        "format": history.run.get("format", FORMAT),
        "verdict": {"headline": verdict.headline, "healthy": verdict.healthy},
        "findings": [
            {
                "kind": finding.kind,
                "alarm": finding.kind in ALARMS,
                "rule": FINDINGS[finding.kind],
                "text": finding.text,
                "figures": dict(finding.figures),
            }
            for finding in verdict.findings
        ],
        "summary": dict(summary(history)),
        "probes": _probes(history),
        "metrics": _metrics(history),
        "events": history.events,
        "heads": _head_cards(history),
        "faithfulness": _last_faithfulness(history),
        "settings": history.run.get("settings") or {},
        "fingerprint": history.run.get("fingerprint"),
        "paths": _paths(history),
    }
    if around is not None:
        described["around"] = [_probe(history, record) for record in _window(history, around, window)]
    return finite_only(described)


def _probes(history: History) -> dict[str, Any]:
    steps = history.steps.tolist()
    return {
        "count": len(steps),
        "failed": sum(record.failure is not None for record in history.records),
        "first_step": steps[0] if steps else None,
        "last_step": steps[-1] if steps else None,
        "seconds": float(np.nansum([record.seconds for record in history.records])),
    }


def _metrics(history: History) -> dict[str, Any]:
    described = {}
    for kind, name in (("accuracy", accuracy_name(history)), ("loss", loss_name(history))):
        values = history.metric(name) if name else np.empty(0)
        values = values[np.isfinite(values)]
        if values.size:
            described[kind] = {
                "name": name,
                "first": values[0],
                "last": values[-1],
                "best": _best(kind, values),
            }
    return described


def _best(kind: str, values: np.ndarray) -> float:
    return float(values.max() if kind == "accuracy" else values.min())


def _head_cards(history: History) -> list[dict[str, Any]]:
    """Every head at the last good probe: its signals, whether it is flagged, and what happened to it."""
    last = next((record for record in reversed(history.records) if record.importance is not None), None)
    if last is None:
        return []
    tables = {name: history.table(last, name) for name in ("shares", *last.signals)}
    cards = []
    for layer, width in enumerate(history.heads):
        for head in range(width):
            events = [e for e in history.events if (e["layer"], e["head"]) == (layer, head)]
            cards.append(
                {
                    "layer": layer,
                    "layer_name": history.layers[layer],
                    "head": head,
                    "flagged": (layer, head) in last.flagged,
                    "signals": {
                        name.replace("shares", "share"): float(t[layer, head]) for name, t in tables.items()
                    },
                    "events": [{"step": e["step"], "kind": e["kind"]} for e in events],
                }
            )
    return cards


def _last_faithfulness(history: History) -> Mapping[str, Any] | None:
    """The last measurement, with its step; None where nothing was measured."""
    for record in reversed(history.records):
        if any(np.isfinite(value) for value in (record.faithfulness or {}).values()):
            return {"step": record.step, **(record.faithfulness or {})}
    return None


def _paths(history: History) -> dict[str, str]:
    names = {
        "record": ".", "history": "history.jsonl", "run": "run.json", "report": "report.html",
        "maps": "maps", "heatmaps": "heatmaps", "inputs": "inputs",
    }  # fmt: skip
    folder = history.dir.resolve()
    return {name: str(folder / path) for name, path in names.items() if (folder / path).exists()}


def _window(history: History, around: int, window: int) -> list[ProbeRecord]:
    steps = history.steps
    if not len(steps) or not steps[0] <= around <= steps[-1]:
        known = f"steps {steps[0]} to {steps[-1]}" if len(steps) else "no probe"
        raise ValueError(f"{history.dir}: step {around} lies outside of the record, which has {known}")
    nearest = int(np.abs(steps - around).argmin())
    return history.records[max(0, nearest - window) : nearest + window + 1]


def _probe(history: History, record: ProbeRecord) -> dict[str, Any]:
    line = record.to_json()
    line.pop("packed", None)
    line["signals"] = {name: table.tolist() for name, table in record.signals.items()}
    line["maps_path"] = _map_path(history, record)
    return line


def _map_path(history: History, record: ProbeRecord) -> str | None:
    path = history.dir.resolve() / "maps" / f"{record.stored_maps}.npz"
    return str(path) if record.stored_maps else None
