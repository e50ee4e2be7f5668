"""Nested batches: rows cut out of them, and their leaves by path, taken apart and put together again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def rows_of(batch: Any, rows: slice | Sequence[int], count: int) -> Any:
    """Some of the samples of a batch.

    Args:
        batch: Tensors, arrays and lists with a row per sample, in tuples, lists and mappings, nested; or a list of
            samples. What has no row per sample is the same for all of them.
        rows: Which samples.
        count: How many the batch has.

    Returns:
        A batch of the same kind.
    """
    if isinstance(batch, (Tensor, np.ndarray)):
        return batch[rows] if batch.ndim and len(batch) == count else batch
    if isinstance(batch, Mapping):
        return _like(batch, {key: rows_of(value, rows, count) for key, value in batch.items()})
    if not isinstance(batch, (list, tuple)):
        return batch
    if are_samples(batch, count):
        return _like(batch, [batch[row] for row in (range(count)[rows] if isinstance(rows, slice) else rows)])
    return _like(batch, [rows_of(value, rows, count) for value in batch])


def joined_batches(batches: Sequence[Any]) -> Any:
    """Several batches of one kind as a single one; what has no rows is that of the first."""
    first = batches[0]
    if isinstance(first, Tensor):
        return torch.cat(list(batches)) if first.ndim else first
    if isinstance(first, np.ndarray):
        return np.concatenate(batches) if first.ndim else first
    if isinstance(first, Mapping):
        return _like(first, {key: joined_batches([batch[key] for batch in batches]) for key in first})
    if not isinstance(first, (list, tuple)):
        return first
    if _is_plain(first):
        return _like(first, [value for batch in batches for value in batch])
    return _like(first, [joined_batches(list(values)) for values in zip(*batches, strict=True)])


def mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """The same structure with every tensor changed."""
    return _mapped(value, lambda leaf, _: change(leaf) if isinstance(leaf, Tensor) else leaf, "")


def leaves_of(value: Any) -> dict[str, Any]:
    """The leaves of a structure by their path, `0.image`; lists of plain values are leaves."""
    leaves: dict[str, Any] = {}
    _mapped(value, lambda leaf, path: leaves.setdefault(path, leaf), "")
    return leaves


def with_leaves(value: Any, leaves: Mapping[str, Any]) -> Any:
    """The structure with these leaves in the place of its own."""
    return _mapped(value, lambda leaf, path: leaves.get(path, leaf), "")


def _mapped(value: Any, change: Callable[[Any, str], Any], path: str) -> Any:
    def inside(key: Any, item: Any) -> Any:
        return _mapped(item, change, f"{path}.{key}" if path else str(key))

    if isinstance(value, Mapping):
        return _like(value, {key: inside(key, item) for key, item in value.items()})
    if isinstance(value, (list, tuple)) and not _is_plain(value):
        return _like(value, [inside(key, item) for key, item in enumerate(value)])
    return change(value, path)


def _like(original: Any, content: Any) -> Any:
    """The content in a container of the original's kind, as far as that kind can be made of its content."""
    if isinstance(original, tuple) and hasattr(original, "_fields"):
        return type(original)(*content)
    if isinstance(original, (tuple, list)):
        return tuple(content) if isinstance(original, tuple) else list(content)
    try:
        return type(original)(content)
    except TypeError:  # a defaultdict, or a mapping with arguments of its own
        return dict(content)


def are_samples(values: Any, count: int) -> bool:
    """Whether a batch is a list with one entry per sample, rather than one column per entry."""
    if not isinstance(values, (list, tuple)) or len(values) != count:
        return False
    kinds = {(type(value), value.ndim if isinstance(value, Tensor) else None) for value in values}
    return len(kinds) == 1 and not all(_is_column(value, count) for value in values)


def _is_column(value: Any, count: int) -> bool:
    """Whether something has a row per sample."""
    if isinstance(value, (Tensor, np.ndarray)):
        # Three pictures of three channels are three samples.
        return value.ndim > 0 and len(value) == count and not (value.ndim == 3 and count == 3)
    if isinstance(value, Mapping):
        return _is_column(list(value.values()), count)
    if not isinstance(value, (list, tuple)):
        return False
    if _is_plain(value):
        return len(value) == count
    columns = [item for item in value if isinstance(item, (Tensor, np.ndarray, Mapping, list, tuple))]
    return bool(columns) and all(_is_column(item, count) for item in columns)


def _is_plain(values: Sequence[Any]) -> bool:
    return not any(isinstance(value, (Tensor, np.ndarray, Mapping, list, tuple)) for value in values)
