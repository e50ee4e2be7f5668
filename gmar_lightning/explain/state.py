"""What a forward pass can change, kept as it is and put back: one small class per kind of state.

Everything is compared by identity and by bytes, never by version counters (writing through `.data` or a NumPy
view moves none) and never by `==` (which belongs to the user's objects).
"""

from __future__ import annotations

import array
import ctypes
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from multiprocessing.sharedctypes import SynchronizedBase
from typing import Any

import numpy as np
import torch
from torch import Tensor

# A probe may hold one copy of what it keeps; a data set in memory is not to be doubled.
# Storages above this size are compared on a sample and not copied, unless they are weights or buffers of a model.
LARGE = 256 << 20
_SAMPLES = 64
# Values without identity of their own, compared by `repr`: it tells -0.0 from 0.0 and takes NaN for itself.
_PLAIN = (bool, int, float, complex, str, bytes, type(None))


class Saved:
    """One thing as it was.

    Attributes:
        where: Its path from the root, as a programmer would write it.
        restorable: Whether there is a copy to put back.
        watched: Whether there is none only because none was asked for.
    """

    restorable = True
    watched = False

    def __init__(self, where: str) -> None:
        self.where = where

    def changed(self) -> bool:
        """Whether it is no longer as it was."""
        raise NotImplementedError

    def restore(self) -> None:
        """Make it as it was."""
        raise NotImplementedError


class SavedContainer(Saved):
    """The contents of a list, dictionary, set or deque, in order; elements by identity.

    The methods of the built-in base are called, so that a subclass which counts or forbids writes is not asked.
    """

    def __init__(self, where: str, container: Any) -> None:
        super().__init__(where)
        self._container = container
        self._content = self._now()
        self._lent: list[tuple[Any, Any]] = []

    def _now(self) -> list[Any]:
        if isinstance(self._container, dict):
            return [part for pair in dict_items(self._container) for part in pair]
        return list(_base_of(self._container).__iter__(self._container))

    def changed(self) -> bool:
        """See `Saved`."""
        return not same_objects(self._now(), self._content)

    def lend(self, substitutes: dict[int, Any]) -> None:
        """Put something else in the place of some elements, until `take_back`."""
        container, content = self._container, self._content
        places = (
            list(zip(content[::2], content[1::2], strict=True))
            if isinstance(container, dict)
            else list(enumerate(content))
        )
        self._lent = [(place, value) for place, value in places if id(value) in substitutes]
        if isinstance(container, (dict, list, deque)):
            for place, value in self._lent:
                _base_of(container).__setitem__(container, place, substitutes[id(value)])

    def take_back(self) -> None:
        """End what `lend` began; places that no longer exist are left to `restore`."""
        for place, value in self._lent:
            _base_of(self._container).__setitem__(self._container, place, value)
        self._lent = []

    def restore(self) -> None:
        """See `Saved`."""
        container, content, base = self._container, self._content, _base_of(self._container)
        if base is list:
            # In place and in one step: other objects hold this very list, and a subclass may refuse
            # `clear`.
            list.__setitem__(container, slice(None), content)
            return
        base.clear(container)
        if isinstance(container, dict):
            for key, value in zip(content[::2], content[1::2], strict=True):
                base.__setitem__(container, key, value)
        elif base is set:
            set.update(container, content)
        else:
            deque.extend(container, content)


class SavedArray(Saved):
    """A NumPy array: its elements where they are objects, else its bytes (a sample of a very large one)."""

    def __init__(self, where: str, array: np.ndarray) -> None:
        super().__init__(where)
        self._array = array
        self.restorable = array.nbytes <= LARGE
        self._saved = array.copy() if self.restorable else self._sampled()

    def _sampled(self) -> np.ndarray:
        rows = np.linspace(0, self._array.size - 1, _SAMPLES * 16).astype(np.int64)
        return self._array.flat[rows]

    def changed(self) -> bool:
        """See `Saved`."""
        array = self._array if self.restorable else self._sampled()
        # Only arrays that can be written are kept; one that was locked meanwhile has changed.
        if array.shape != self._saved.shape or not self._array.flags.writeable:
            return True
        if array.dtype == object:
            return any(a is not b for a, b in zip(array.flat, self._saved.flat, strict=True))
        return array.tobytes() != self._saved.tobytes()

    def restore(self) -> None:
        """See `Saved`."""
        if self.restorable:
            self._array.flags.writeable = True
            if self._array.shape != self._saved.shape:
                # Views of it exist for certain (the saved attributes among them); the check would refuse.
                self._array.resize(self._saved.shape, refcheck=False)
            self._array[...] = self._saved


class SavedPosition(Saved):
    """A state that one call reads and another writes: random generators, open files, scripted attributes."""

    def __init__(self, where: str, read: Callable[[], Any], write: Callable[[Any], Any]) -> None:
        super().__init__(where)
        self._read, self._write, self._state = read, write, read()

    def changed(self) -> bool:
        """See `Saved`."""
        return not equal_states(self._read(), self._state)

    def restore(self) -> None:
        """See `Saved`."""
        self._write(self._state)


def generator_state(where: str, value: Any) -> Saved | None:
    """The state of a random generator of torch, NumPy or Python; None for anything else."""
    if isinstance(value, torch.Generator):
        return SavedPosition(where, value.get_state, value.set_state)
    if isinstance(value, (np.random.RandomState, random.Random)) and type(value) is not random.SystemRandom:
        # The two name their state differently; SystemRandom has none.
        legacy: Any = value
        if isinstance(value, random.Random):
            return SavedPosition(where, legacy.getstate, legacy.setstate)
        return SavedPosition(where, legacy.get_state, legacy.set_state)
    bits: Any = value.bit_generator if isinstance(value, np.random.Generator) else value
    if isinstance(bits, np.random.BitGenerator):
        return SavedPosition(where, lambda: bits.state, lambda state: setattr(bits, "state", state))
    return None


def shared_state(where: str, value: Any) -> Saved | None:
    """The bytes of a `multiprocessing.Value` or `Array`; None for anything else.

    It lies in memory that the loader's processes share, and refuses to be pickled or copied.
    """
    if not isinstance(value, SynchronizedBase):
        return None
    raw = value.get_obj()
    where_it_lies, size = ctypes.addressof(raw), ctypes.sizeof(raw)
    return SavedPosition(
        where,
        lambda: ctypes.string_at(where_it_lies, size),
        lambda content: ctypes.memmove(where_it_lies, content, size),
    )


def equal_states(one: Any, other: Any) -> bool:
    """Whether two plain states (nested tuples, dictionaries, arrays, tensors) are equal, bit for bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, (np.ndarray, array.array)):
        return one.tobytes() == other.tobytes()
    if isinstance(one, bytearray):
        return one == other
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(equal_states(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal_states(one[key], other[key]) for key in one)
    return one is other or (isinstance(one, _PLAIN) and repr(one) == repr(other))


def dict_items(container: dict[Any, Any]) -> Iterable[tuple[Any, Any]]:
    """Items as they lie in a dictionary, past whatever a subclass makes of `items`."""
    return OrderedDict.items(container) if isinstance(container, OrderedDict) else dict.items(container)


def _base_of(container: Any) -> Any:
    for base in (OrderedDict, dict, list, set, deque):
        if isinstance(container, base):
            return base
    raise TypeError(type(container).__name__)


def same_objects(now: list[Any], before: list[Any]) -> bool:
    """Whether two lists hold the same objects in the same places; plain values by what they are."""
    return len(now) == len(before) and all(
        a is b or (type(a) is type(b) and isinstance(a, _PLAIN) and repr(a) == repr(b))
        for a, b in zip(now, before, strict=True)
    )
