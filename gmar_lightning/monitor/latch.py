"""What a monitor must remember between probes, in memory that does not grow with them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

_BURST = 3.0  # times its own peak: a head that jumps this far at once has exploded
_HABIT = 5.0  # times the median head: more than that is an explosion, and its end is no loss
MOST = 0.75  # "the model" shrank when this fraction of its layers did
HOLD = 3  # probes a level must be held to count as a peak: a spike of one or two probes is no reference


class Latch:
    """Conditions that switch on, and off again, only after an unbroken run of probes that say so.

    Args:
        shape: One latch for each entry of an array of this shape.
        on_after: Probes in a row that raise a latch.
        off_after: Probes in a row that clear it.
    """

    def __init__(self, shape: tuple[int, ...], on_after: int, off_after: int) -> None:
        self.on_after, self.off_after = on_after, off_after
        self.active = np.zeros(shape, dtype=bool)
        self.run = np.zeros(shape, dtype=np.int64)
        self.start = np.full(shape, -1, dtype=np.int64)
        self.since = np.full(shape, -1, dtype=np.int64)

    def update(self, step: int, on: np.ndarray, off: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Count one more probe; returns what was just raised and what was just cleared, both of `shape`."""
        wants = np.where(self.active, off, on)
        self.start = np.where(wants & (self.run == 0), step, self.start)
        self.run = np.where(wants, self.run + 1, 0)
        flips = wants & (self.run >= np.where(self.active, self.off_after, self.on_after))
        self.since = np.where(flips, self.start, self.since)
        self.run = np.where(flips, 0, self.run)
        self.active = self.active ^ flips
        return flips & self.active, flips & ~self.active

    def restart(self) -> None:
        """Forget what is being counted; what was raised stays raised."""
        self.run = np.zeros_like(self.run)

    def state_dict(self) -> dict[str, Any]:
        """Plain lists."""
        return {name: getattr(self, name).tolist() for name in ("active", "run", "start", "since")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`; raises ValueError for another shape."""
        for name in ("active", "run", "start", "since"):
            setattr(self, name, restored(state[name], getattr(self, name)))


class HeldPeak:
    """The highest level held for three updates running: the running maximum of the minimum of the last three.

    Args:
        shape: One peak for each entry of an array of this shape; non-negative values.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.last = np.zeros(shape)
        self.before = np.zeros(shape)
        self.value = np.zeros(shape)

    def update(self, values: np.ndarray, counts: np.ndarray) -> None:
        """Take in one more array of `shape`; the peak stays where `counts` is False."""
        held = np.minimum(np.minimum(values, self.last), self.before)
        self.value = np.where(counts, np.maximum(self.value, held), self.value)
        self.before, self.last = self.last, values

    def state_dict(self) -> dict[str, Any]:
        """Plain lists."""
        return {name: getattr(self, name).tolist() for name in ("last", "before", "value")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`; raises ValueError for another shape."""
        for name in ("last", "before", "value"):
            setattr(self, name, restored(state[name], getattr(self, name)))


class HeadMemory:
    """What the importance of each head has been, `(layers, heads)`.

    Attributes:
        present: Where there is a head; layers with fewer heads are padded.
        age: Probes of each head so far.
        low: Raw importance when the head was called collapsed or dormant.
        raw: Highest raw importance that was held.
        share: Highest share of the layer that was held.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.present = np.zeros(shape, dtype=bool)
        self.age = np.zeros(shape, dtype=np.int64)
        self.low = np.zeros(shape)
        self.raw, self.share = HeldPeak(shape), HeldPeak(shape)

    def excuse_what_fell_by_an_explosion(self, raw: np.ndarray, share: np.ndarray) -> None:
        """What fell in the same probe in which a neighbour exploded fell because of it: not a loss of its own."""
        peak, last = self.raw.value, self.raw.last
        burst = (peak > 0) & (raw > _BURST * peak) & (raw > 2 * last) & (share > 0.5) & (share < 1)
        if not burst.any():
            return
        fell = np.divide(raw, last, out=np.ones_like(raw), where=(last > 0) & ~burst)
        self.raw.value = self.raw.value * np.minimum(fell, 1.0)

    def typical(self, values: np.ndarray, dormant: np.ndarray) -> np.ndarray:
        """The median living head of each layer, `(layers, 1)`."""
        living = (self.raw.value > 0) & ~dormant
        return lower_median(np.where(living, values, np.nan))

    def kept(self, raw: np.ndarray, warmup: int) -> np.ndarray:
        """What each head kept of its peak; NaN where there is nothing to compare with."""
        judged = self.present & (self.age >= warmup) & (self.raw.value > 0)
        return np.divide(raw, self.raw.value, out=np.full(raw.shape, np.nan), where=judged)

    def best_kept(self, kept: np.ndarray, of_age: int, dormant: np.ndarray) -> np.ndarray:
        """What the best-kept living head of each layer kept, at most 1; `(layers,)`."""
        living = np.isfinite(kept) & ~dormant
        top = np.where(living, kept, 0.0).max(axis=1, initial=0.0)
        # A layer that never carried any gradient has kept nothing; one that cannot be judged yet, everything.
        old = self.present & (self.age + 1 >= of_age)
        silent = (self.raw.value.max(axis=1, initial=0.0) == 0) & old.any(axis=1)
        return np.where(living.any(axis=1), np.minimum(top, 1.0), np.where(silent, 0.0, 1.0))

    def take_in(self, raw: np.ndarray, share: np.ndarray, dormant: np.ndarray) -> None:
        """Remember one more probe."""
        # The first probe is no reference: a model at initialisation is not typical of itself.
        seen = self.age > 0
        exploded = (self.raw.value > 0) & (raw > _HABIT * self.typical(raw, dormant))
        self.raw.update(np.where(seen, raw, 0.0), ~exploded)
        self.share.update(np.where(seen, share, 0.0), seen)
        self.age = self.age + self.present

    def state_dict(self) -> dict[str, Any]:
        """Plain lists."""
        arrays = {name: getattr(self, name).tolist() for name in ("present", "age", "low")}
        return {**arrays, "raw": self.raw.state_dict(), "share": self.share.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`; raises ValueError for another shape."""
        for name in ("present", "age", "low"):
            setattr(self, name, restored(state[name], getattr(self, name)))
        self.raw.load_state_dict(state["raw"])
        self.share.load_state_dict(state["share"])


class LevelMemory:
    """The highest level that was held of any number of named quantities, each in an array of one shape.

    A quantity is remembered from the second probe that shows it: the first is a model at initialisation.

    Args:
        shape: Shape of each quantity.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape
        self._peaks: dict[str, HeldPeak] = {}
        self._ages: dict[str, np.ndarray] = {}

    def age(self, name: str) -> np.ndarray:
        """For how many probes each entry has been a number."""
        return self._ages.get(name, np.zeros(self._shape, dtype=np.int64))

    def reference(self, name: str) -> np.ndarray:
        """The highest level held; NaN where there is none yet."""
        if name not in self._peaks:
            return np.full(self._shape, np.nan)
        value = self._peaks[name].value
        return np.where(value > 0, value, np.nan)

    def take_in(self, levels: Mapping[str, np.ndarray]) -> None:
        """Remember one more probe; entries that are NaN were not seen."""
        for name, values in levels.items():
            peak = self._peaks.setdefault(name, HeldPeak(self._shape))
            seen = np.isfinite(values)
            started = seen & (self.age(name) > 0)
            peak.update(np.where(started, values, 0.0), started)
            self._ages[name] = self.age(name) + seen

    def state_dict(self) -> dict[str, Any]:
        """Plain lists by name."""
        return {
            name: {"age": self._ages[name].tolist(), **peak.state_dict()}
            for name, peak in self._peaks.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`; raises ValueError for another shape."""
        self._peaks, self._ages = {}, {}
        for name, part in state.items():
            self._peaks[name] = HeldPeak(self._shape)
            self._peaks[name].load_state_dict(part)
            self._ages[name] = restored(part["age"], np.zeros(self._shape, dtype=np.int64))


def most(ordered: np.ndarray) -> float:
    """The value that all but a quarter of the ascending values do not exceed."""
    return float(ordered[math.ceil(MOST * (len(ordered) - 1))])


def most_of_the_others(values: np.ndarray) -> np.ndarray:
    """`most` of all values but one, for each; 1 where there is no other."""
    if len(values) == 1:
        return np.ones(1)
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    cut = math.ceil(MOST * (len(values) - 2))
    result = np.empty_like(values)
    result[order] = np.where(np.arange(len(values)) <= cut, ordered[cut + 1], ordered[cut])
    return result


def lower_median(values: np.ndarray) -> np.ndarray:
    """Median of each row's numbers, the lower of two; 0 for a row of NaN; `(layers, 1)`."""
    ordered = np.sort(values, axis=1)
    count = np.isfinite(values).sum(axis=1, keepdims=True)
    middle = np.take_along_axis(ordered, np.maximum(count - 1, 0) // 2, axis=1)
    return np.where(count > 0, middle, 0.0)


def restored(values: object, like: np.ndarray) -> np.ndarray:
    """Nested lists as an array of the shape and type of `like`; raises ValueError where they do not fit."""
    array = np.asarray(values, dtype=like.dtype)
    if array.size == like.size == 0:
        return like
    if array.shape != like.shape:
        raise ValueError(f"state of shape {array.shape} does not fit {like.shape}")
    return array
