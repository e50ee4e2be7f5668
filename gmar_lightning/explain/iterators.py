"""Live iterators that a forward draws from: lent as copies where they can be copied, guarded where not."""

from __future__ import annotations

import copy
import types
from typing import Any

from gmar_lightning.explain.errors import LiveIteratorError


class Guard:
    """Stands in for a live generator while a probe runs: what was drawn from it could not be put back."""

    def __init__(self, where: str) -> None:
        self.where, self.asked = where, False

    def __iter__(self) -> Guard:
        return self

    def __deepcopy__(self, memo: Any) -> Guard:
        return self  # of a copy of the model, too, it is told what was drawn from

    def __next__(self) -> Any:
        self.asked = True
        raise LiveIteratorError(
            f"a probe would draw from {self.where}, a live iterator that can be neither rewound nor copied, "
            "and what it takes training would miss."
        )

    send = throw = __next__


def lent(where: str, iterator: Any) -> Any:
    """What a probe draws from in the place of a live iterator."""
    if isinstance(iterator, Guard):
        return iterator  # of the block around this one, which wants to know
    if isinstance(iterator, types.GeneratorType) or type(iterator).__module__.startswith("torch."):
        return Guard(where)
    try:
        return copy.deepcopy(iterator)
    except Exception:
        return Guard(where)
