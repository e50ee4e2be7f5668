"""Two things a monitor must remember between probes, in memory that does not grow with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

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


def restored(values: object, like: np.ndarray) -> np.ndarray:
    """Nested lists as an array of the shape and type of `like`; raises ValueError where they do not fit."""
    array = np.asarray(values, dtype=like.dtype)
    if array.size == like.size == 0:
        return like
    if array.shape != like.shape:
        raise ValueError(f"state of shape {array.shape} does not fit {like.shape}")
    return array
