"""One probe as one typed record, and as one line of `history.jsonl`: this file is the schema of that file.

A line is one JSON object. `from_json` reads format 2, described here, and format 1, the version before.

| key | value |
|---|---|
| `step`, `global_step`, `epoch` | the logger's x, optimizer steps taken, epoch |
| `seconds` | what the probe took |
| `segment` | number of the set of probe images, see `segments` in `run.json` |
| `importance` | `(layers, heads)` as nested lists, 4 significant digits, null where not finite |
| `shape`, `packed` | `[layers, heads]`; every other signal in base64, see `SIGNALS` and `monitor.packing` |
| `targets`, `predictions` | class explained and class predicted, per probe image |
| `probabilities`, `scores` | probability of the prediction and explained scalar, per image, 4 significant digits |
| `events`, `flagged` | what the detector reported, as `HeadEvent`; `[layer, head]` of every head flagged now |
| `drift` | null, or name to one value per image, packed alike, see `DriftTracker` |
| `metrics` | what the trainer had logged last |
| `faithfulness` | null when switched off, or name to number, null where it was not due |
| `verification` | null, or what the callback's test of itself found |
| `failure` | null, or why the probe failed; then there are no signals |
| `source` | "probe", or "step": read off a training step (`read="step"`), of the loss on a training batch |
| `maps`, `head_maps` | null, or the name of the probe's file in `maps/` and in `head_maps/`, without `.npz` |

Shares are not stored: they follow from importance, see `ProbeRecord.shares`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch

from gmar_lightning.explain.importance import head_shares
from gmar_lightning.monitor.events import HeadEvent
from gmar_lightning.monitor.packing import SIGNALS, packed, unpacked

FORMAT = 2

# Where the numbers of a record come from.
Source = Literal["probe", "step"]

# How many significant digits `importance`, probabilities and scores keep.
_DIGITS = 4


@dataclass(frozen=True, eq=False)
class ProbeRecord:
    """What one probe came to; complete when it leaves `monitor.probing`, and never changed after that.

    Tables of heads are float arrays `(layers, heads)`; NaN where a layer has fewer heads than the widest one
    and where a value is not finite.

    Attributes:
        step: The logger's x, as Lightning's own training rows have it.
        global_step: Optimizer steps taken.
        epoch: Current epoch.
        seconds: What the probe took.
        segment: Number of the set of probe images; maps of two segments are not comparable.
        signals: Name to table, see `packing.SIGNALS`; empty when the probe failed.
        targets: Explained class of each probe image.
        predictions: Predicted class of each probe image.
        probabilities: Probability of that class.
        scores: Explained scalar of each probe image.
        events: What the detector reported.
        flagged: `(layer, head)` of every head flagged now.
        drift: Name to `(images,)`, the maps beside earlier ones; None where there is nothing to compare with.
        metrics: What the trainer had logged last.
        faithfulness: Name to number, NaN where it was not due; None when it is switched off.
        verification: What the callback's test of itself found, as plain values; None where it was not run.
        failure: Why the probe failed; None when it did not.
        maps: Form of the rollout to maps `(images, grid_h, grid_w)`, the primary form first. Beside the line,
            not in it; empty once the record has been stored or read back.
        head_maps: `(images, layers, heads, grid_h, grid_w)` or None; likewise.
        layers: Module path of each attention layer; likewise.
        classes: Which class scores are explained, `classes=10`, or `classes=192?` where nothing confirms that they
            are class scores; known at a run's first probe, else empty; likewise.
        source: "probe": a logit on the probe images; "step": the loss on the batch of a training step, read off that
            step. Numbers of the two are not comparable, and one record holds one of them.
        stored_maps: Name of the files that hold the maps; None before they are stored.
        stored_head_maps: The same for the maps of heads.
    """

    step: int
    global_step: int
    epoch: int = 0
    seconds: float = math.nan
    segment: int = 0
    signals: Mapping[str, np.ndarray] = field(default_factory=dict)
    targets: tuple[int, ...] = ()
    predictions: tuple[int, ...] = ()
    probabilities: tuple[float, ...] = ()
    scores: tuple[float, ...] = ()
    events: tuple[HeadEvent, ...] = ()
    flagged: tuple[tuple[int, int], ...] = ()
    drift: Mapping[str, np.ndarray] | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    faithfulness: Mapping[str, float] | None = None
    verification: Mapping[str, Any] | None = None
    failure: str | None = None
    maps: Mapping[str, np.ndarray] = field(default_factory=dict)
    head_maps: np.ndarray | None = None
    layers: tuple[str, ...] = ()
    classes: str = ""
    source: Source = "probe"
    stored_maps: str | None = None
    stored_head_maps: str | None = None

    @property
    def position(self) -> tuple[int, int]:
        """Where the probe stands in the run: optimizer steps, then the logger's x."""
        return self.global_step, self.step

    @property
    def importance(self) -> np.ndarray | None:
        """Raw importance `(layers, heads)`; None when the probe failed."""
        return self.signals.get("importance")

    @cached_property
    def shares(self) -> np.ndarray | None:
        """Each head's share of its layer's importance, `(layers, heads)`; 0 in a layer without gradient."""
        return None if self.importance is None else shares_of(self.importance)

    @property
    def heatmaps(self) -> np.ndarray | None:
        """Maps of the primary form, `(images, grid_h, grid_w)`; None without maps in memory."""
        return next(iter(self.maps.values()), None)

    @property
    def newly_collapsed(self) -> int:
        """How many heads this probe flagged."""
        return sum(event.kind == "collapsed" for event in self.events)

    def to_json(self) -> dict[str, Any]:
        """The line of `history.jsonl` as plain values; the module's docstring says what they are."""
        others = {name: table for name, table in self.signals.items() if name != "importance"}
        tables: dict[str, Any] = {} if self.importance is None else {"importance": _rows(self.importance)}
        if others:
            tables["shape"] = list(next(iter(others.values())).shape)
            tables["packed"] = {name: packed(name, table) for name, table in others.items()}
        drift = self.drift and {name: packed(name, values[None]) for name, values in self.drift.items()}
        return {
            "step": self.step,
            "global_step": self.global_step,
            "epoch": self.epoch,
            "seconds": _digits(self.seconds),
            "segment": self.segment,
            **tables,
            "targets": list(self.targets),
            "predictions": list(self.predictions),
            "probabilities": [_digits(value) for value in self.probabilities],
            "scores": [_digits(value) for value in self.scores],
            "events": [finite_only(asdict(event)) for event in self.events],
            "flagged": [list(cell) for cell in self.flagged],
            "drift": drift,
            "metrics": finite_only(self.metrics),
            "faithfulness": None if self.faithfulness is None else finite_only(self.faithfulness),
            "verification": None if self.verification is None else finite_only(self.verification),
            "failure": self.failure,
            "source": self.source,
            "maps": self.stored_maps,
            "head_maps": self.stored_head_maps,
        }

    @classmethod
    def from_json(cls, line: Mapping[str, Any], heads: Sequence[int] = ()) -> ProbeRecord:
        """Read a line back, of this format or of the one before.

        Args:
            line: What `json.loads` made of the line.
            heads: Heads of each layer, as `run.json` says; fixes the width of tables with ragged rows.

        Raises:
            KeyError: `step` or `global_step` is missing.
            ValueError: An entry is not what it should be; TypeError likewise.
        """
        # Format 1 holds every signal as nested lists; `shares` among them follow from importance.
        signals = {name: _table(line[name], heads) for name in SIGNALS if line.get(name)}
        for name, (kind, parameter, text) in (line.get("packed") or {}).items():
            signals[name] = unpacked(kind, parameter, text, line["shape"])
        drift, faithfulness = line.get("drift"), line.get("faithfulness")
        return cls(
            step=int(line["step"]),
            global_step=int(line["global_step"]),
            epoch=line.get("epoch") or 0,
            seconds=_number(line.get("seconds")),
            segment=line.get("segment") or 0,
            signals=signals,
            targets=tuple(line.get("targets") or ()),
            predictions=tuple(line.get("predictions") or ()),
            probabilities=tuple(map(_number, line.get("probabilities") or ())),
            scores=tuple(map(_number, line.get("scores") or ())),
            events=tuple(_event(event) for event in line.get("events") or ()),
            flagged=tuple((int(layer), int(head)) for layer, head in line.get("flagged") or ()),
            drift=drift and {name: _per_image(values) for name, values in drift.items()},
            metrics={name: _number(value) for name, value in (line.get("metrics") or {}).items()},
            faithfulness=None if faithfulness is None else _faithfulness(faithfulness),
            verification=line.get("verification"),
            failure=line.get("failure") or line.get("error"),  # `error` in format 1
            source="step" if line.get("source") == "step" else "probe",
            stored_maps=line.get("maps"),
            stored_head_maps=line.get("head_maps"),
        )


def shares_of(importance: np.ndarray) -> np.ndarray:
    """`head_shares` of an array `(..., layers, heads)`."""
    return head_shares(torch.from_numpy(np.asarray(importance, dtype=np.float64))).numpy()


def effective_heads(shares: np.ndarray) -> np.ndarray:
    """How many heads a layer really uses: the exponential of the entropy of its shares.

    Args:
        shares: `(..., layers, heads)`, sum 1 over the heads of a layer; NaN for heads that do not exist.

    Returns:
        `(..., layers)`: between 1 and the number of heads; 0 for a layer without gradient, NaN without data.
    """
    known = np.isfinite(shares)
    used = known & (shares > 0)
    safe = np.where(used, shares, 1.0)
    effective = np.where(used.any(axis=-1), np.exp(-(safe * np.log(safe)).sum(axis=-1)), 0.0)
    return np.where(known.any(axis=-1), effective, np.nan)


def head_counts(importance: np.ndarray) -> list[int]:
    """Heads of each layer of a table `(layers, heads)`, which is padded with NaN behind the last head."""
    known = np.isfinite(importance)
    behind = np.argmax(known[:, ::-1], axis=1)
    # A layer of nothing but NaN is a broken one, not one without heads.
    return np.where(known.any(axis=1), importance.shape[1] - behind, importance.shape[1]).tolist()


def finite_only(value: Any) -> Any:
    """Nested plain values as JSON knows them: NaN and infinity become null, scalars of arrays numbers."""
    if isinstance(value, Mapping):
        return {str(key): finite_only(item) for key, item in value.items()}
    to_list = getattr(value, "tolist", None)  # numpy and torch, scalars included
    if callable(to_list):
        value = to_list()
    if isinstance(value, (list, tuple)):
        return [finite_only(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _rows(table: np.ndarray) -> list[list[float | None]]:
    table = np.asarray(table, dtype=np.float64)
    return [[_digits(value) for value in row] for row in table.tolist()]


def _table(rows: Sequence[Sequence[float | None]], heads: Sequence[int]) -> np.ndarray:
    """Nested lists as an array; short rows are filled with NaN."""
    width = max([*map(len, rows), *heads])
    if all(len(row) == width for row in rows):
        return np.array(rows, dtype=np.float64)
    return np.array([[*row, *[None] * (width - len(row))] for row in rows], dtype=np.float64)


def _digits(value: float) -> float | None:
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None


def _per_image(values: Sequence[Any]) -> np.ndarray:
    # Plain numbers and nulls in format 1; since then, packed as a table of one row is.
    if values and isinstance(values[0], str):
        return unpacked(*values)
    return np.array(values, dtype=np.float64)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _event(line: Mapping[str, Any]) -> HeadEvent:
    # A newer version may say more about an event than this one knows.
    return HeadEvent(**{name: value for name, value in line.items() if name in _EVENT_FIELDS})


_EVENT_FIELDS = frozenset(item.name for item in fields(HeadEvent))


def _faithfulness(line: Mapping[str, Any]) -> dict[str, float]:
    # Format 1 wrote the names as they are logged.
    return {name.removeprefix("gmar/faithfulness_"): _number(value) for name, value in line.items()}
