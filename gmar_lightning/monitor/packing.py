"""The signals per head that a record knows: unit, how images are combined, and how few bytes hold a table.

In a line of `history.jsonl` a packed signal is `[kind, parameter, text]`. The text is base64 of little-endian
values, layer by layer; a signal with one value per layer has as many values as layers. The kinds:

- "f4": IEEE single precision, parameter null.
- "f2": IEEE half precision (11 bits: 3 significant digits) of the values divided by 2 to the parameter.
- "u1": whole numbers from 0 to 254 between the two extremes that are the parameter; 255 is no such head.
- "u2": whole numbers as they are, parameter null; 65535 is no such head.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

_NO_BYTE, _NO_INDEX = 255, 65535
# Half precision holds numbers below 2 to this, and normal numbers nine decades below that.
_LARGEST_HALF = 15


@dataclass(frozen=True)
class Signal:
    """What one signal per head is.

    Attributes:
        unit: Of its values.
        over_images: How the values of the probe images become one.
        stored: Kind of the packed table; "digits" are JSON numbers of 4 significant digits, not packed.
        per_layer: All heads of a layer have the same value, which is stored once.
    """

    unit: str
    over_images: Literal["mean", "mean of absolutes", "max", "most frequent"] = "mean"
    stored: Literal["digits", "f4", "f2", "u1", "u2"] = "f2"
    per_layer: bool = False


# At most 10 bytes for the first, 5.3 for the second, 2.7 for half precision, 1.3 for a byte. All of them, with
# what a probe of 32 images says beside, stay below 60 bytes per head and probe from 12 x 12 heads on.
SIGNALS: Mapping[str, Signal] = {
    "importance": Signal("norm of d score / d map", stored="digits"),
    "contribution": Signal("score, without sign", "mean of absolutes", "f4"),
    "contribution_signed": Signal("score"),
    "entropy": Signal("1 = uniform attention, 0 = one token"),
    "distance": Signal("patches", stored="u1"),
    "output_norm": Signal("norm of the head's output"),
    "value_norm": Signal("norm of the head's values"),
    "gradient_norm": Signal("norm of d score / d output"),
    "logit_max": Signal("largest logit before the softmax", "max"),
    "sink_mass": Signal("0 to 1, attention to the most attended key", stored="u1"),
    "sink_token": Signal("index of that key", "most frequent", "u2"),
    "sink_value_norm": Signal("its value norm over the mean of the others"),
    "output_rank": Signal("effective rank of the head's output"),
    "similarity": Signal("cosine to the nearest other head of the layer", stored="u1"),
    "value_similarity": Signal("mean cosine between the values of two tokens", stored="u1"),
    "token_similarity": Signal("mean cosine of the tokens entering the layer", per_layer=True),
}
_OTHER = Signal("unknown")  # one that another version knows


def signal_of(name: str) -> Signal:
    """What is known of the signal `name`."""
    return SIGNALS.get(name, _OTHER)


def packed(name: str, table: np.ndarray) -> list[Any]:
    """A table `(layers, heads)` as `[kind, parameter, text]`; the module's docstring says what they are."""
    signal, table = signal_of(name), np.asarray(table, dtype=np.float64)
    table = table[:, :1] if signal.per_layer else table
    known = np.isfinite(table)
    values, parameter = np.where(known, table, 0.0), None
    if signal.stored == "u2":
        raw = np.where(known, np.clip(values, 0, _NO_INDEX - 1), _NO_INDEX).round().astype("<u2")
    elif signal.stored == "u1":
        low, high = _extremes(values[known])
        raw = np.where(known, (values - low) / max(high - low, 1e-30) * (_NO_BYTE - 1), _NO_BYTE)
        raw, parameter = raw.round().astype("u1"), [low, high]
    elif signal.stored == "f4":
        raw = np.where(known, values, np.nan).astype("<f4")
    else:
        parameter = math.frexp(np.abs(values).max(initial=0.0))[1] - _LARGEST_HALF
        raw = np.where(known, np.ldexp(values, -parameter), np.nan).astype("<f2")
    return [f"{raw.dtype.kind}{raw.itemsize}", parameter, base64.b64encode(raw.tobytes()).decode("ascii")]


def unpacked(kind: str, parameter: Any, text: str, shape: Sequence[int] | None = None) -> np.ndarray:
    """The table, float32 of `shape` (one row of what there is, without); NaN where there was no finite value."""
    values = np.frombuffer(base64.b64decode(text), f"<{kind}")
    if kind == "u2":
        table = np.where(values == _NO_INDEX, np.float32(np.nan), values.astype(np.float32))
    elif kind == "u1":
        low, high = parameter
        table = low + values.astype(np.float32) / (_NO_BYTE - 1) * (high - low)
        table = np.where(values == _NO_BYTE, np.nan, table).astype(np.float32)
    elif kind == "f2":
        table = np.ldexp(values.astype(np.float32), parameter)
    else:
        table = values.astype(np.float32)
    if shape is None:
        return table
    layers, heads = shape
    return (
        table.reshape(layers, heads) if table.size == layers * heads else np.repeat(table[:, None], heads, 1)
    )


def _extremes(values: np.ndarray) -> tuple[float, float]:
    if not values.size:
        return 0.0, 0.0
    # As few digits as single precision needs.
    return float(f"{values.min():.7g}"), float(f"{values.max():.7g}")
