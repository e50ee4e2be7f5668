"""Images and labels in whatever a loader yields: tuples, dictionaries, dataclasses, nested, in any position."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from gmar_lightning.explain.inputs import Inputs, image_key, named_inputs
from gmar_lightning.explain.nested import are_samples, rows_of

IMAGE_KEYS = ("images", "image", "pixel_values", "inputs", "input", "x", "img")
LABEL_KEYS = ("labels", "label", "targets", "target", "y", "class", "classes", "class_id")
_DEEPEST = 4
# Marks, within this file, a part that came under a key of a mapping.
_KEY = "\0"


def unpack_batch(
    batch: Any, positions: Sequence[int] = (), inputs: Inputs = None
) -> tuple[Tensor, Tensor | None]:
    """Images and labels of a batch.

    Images are the tensor `(batch, channels, height, width)` under one of `IMAGE_KEYS`, else the first there is
    outside of mappings.
    Labels are class indices `(batch,)` or `(batch, 1)` under one of `LABEL_KEYS`, else the first there are that
    are not the samples' own positions; one-hot and soft labels `(batch, classes)` stand for their largest class.

    Args:
        batch: A tensor, or tuples, lists, mappings, named tuples and dataclasses of them, nested.
        positions: Indices of the samples in their data set, where they are known.
        inputs: Makes of the batch what a model takes, see `gmar`; says which are the images, too.

    Returns:
        Images `(batch, channels, height, width)` and labels `(batch,)` or None.

    Raises:
        ValueError: Naming the keys or positions that were seen.
    """
    if inputs is not None:
        return _made(batch, positions, inputs)
    parts = list(_parts(batch, ""))
    pictures = [(name, value) for name, value in parts if _is_images(value)]
    named = [value for key in IMAGE_KEYS for name, value in pictures if _last(name) == key]
    # A mapping's other keys may stand for anything (masks, a second view), so there the name has to be known.
    placed = [value for name, value in pictures if not name.endswith(_KEY)]
    images = next(iter([*named, *placed]), None)
    if images is None:
        by_name = any(not _last(name).isdigit() for name, _ in parts)
        hint = f"name the images one of {', '.join(IMAGE_KEYS)}" if by_name else "put (images, labels) first"
        seen = ", ".join(f"{_place(name)}: {_described(value)}" for name, value in parts) or "nothing"
        raise ValueError(
            f"no images (batch, channels, height, width) in the batch; found {seen}. "
            f"Either {hint}, or pass probe_batch=(images, labels)."
        )
    labels = _labels(parts, len(images), list(positions))
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"the batch has {len(images)} images but {len(labels)} labels")
    return images, labels


def _made(batch: Any, positions: Sequence[int], inputs: Inputs) -> tuple[Tensor, Tensor | None]:
    """Images that a callable made of a batch (token sequences for a model without any), and labels found in it."""
    given = named_inputs(batch, inputs)
    key = image_key(given)
    tensors = [value for value in given.values() if isinstance(value, Tensor) and value.ndim]
    if key is None and not tensors:
        raise ValueError("inputs= made no tensor with a row per image of the batch")
    images = tensors[0] if key is None else given[key]
    alone = named_inputs(rows_of(batch, [0], len(images)), inputs)
    first = (
        next(value for value in alone.values() if isinstance(value, Tensor)) if key is None else alone[key]
    )
    if first.shape != images[:1].shape or not torch.equal(first, images[:1]):
        raise ValueError(
            f"the batch cannot be cut into images: inputs= makes {tuple(images.shape)} of all of it, and of its "
            f"first row {tuple(first.shape)}, which is not the first image. Give every part a row per image."
        )
    if are_samples(batch, len(images)):
        try:
            batch = default_collate(list(batch))
        except (TypeError, RuntimeError, KeyError):
            return images, None  # samples of different shapes: their labels are not looked for
    labels = _labels(list(_parts(batch, "")), len(images), list(positions))
    return images, labels if labels is not None and len(labels) == len(images) else None


def masks_of(batch: Any, images: Tensor) -> Tensor | None:
    """Where the evidence lies, in a batch that says so: the boolean tensor `(batch, height, width)` in it.

    Args:
        batch: As for `unpack_batch`.
        images: The images `(batch, channels, height, width)` of the batch.

    Returns:
        The first such tensor, of the images' own size; None without one.
    """
    shape = (len(images), *images.shape[-2:])
    masks = (value for _, value in _parts(batch, "") if isinstance(value, Tensor) and value.shape == shape)
    return next((mask for mask in masks if mask.dtype == torch.bool), None)


def _parts(value: Any, name: str, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Leaves of a nested batch with their path."""
    inner: Any = None
    if isinstance(value, Mapping):
        inner = [(f"{key}{_KEY}", item) for key, item in value.items()]
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        inner = [(item.name, getattr(value, item.name)) for item in dataclasses.fields(value)]
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        inner = zip(value._fields, value, strict=True)  # type: ignore[attr-defined]
    elif isinstance(value, (tuple, list)) and not _is_column(value):
        inner = enumerate(value)
    elif hasattr(value, "__dict__") and not isinstance(value, (Tensor, type)) and not callable(value):
        inner = vars(value).items()
    if inner is None or depth > _DEEPEST:
        yield name or "0", value
        return
    for key, item in inner:
        yield from _parts(item, f"{name}.{key}" if name else str(key), depth + 1)


def _is_column(value: Sequence[Any]) -> bool:
    """One plain value per sample: numbers or strings, as some collate functions leave them."""
    return bool(value) and all(isinstance(item, (int, np.integer, str)) for item in value)


def _labels(parts: list[tuple[str, Any]], count: int, positions: list[int]) -> Tensor | None:
    named = [(key, value) for key in LABEL_KEYS for name, value in parts if _last(name) == key]
    for _, value in named:
        classes = _classes(value, count, named=True)
        if classes is not None:
            return classes
    columns = [classes for _, value in parts if (classes := _classes(value, count, named=False)) is not None]
    others = [column for column in columns if column.tolist() != positions]
    return next(iter(others or ([] if positions else columns)), None)


def _classes(value: Any, count: int, named: bool) -> Tensor | None:
    """Class indices `(batch,)` in one part of a batch; None when they are something else."""
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, (int, np.integer)) for v in value):
        value = torch.tensor([int(v) for v in value])
    if isinstance(value, np.ndarray) and value.dtype.kind in "iu":
        value = torch.from_numpy(value.astype(np.int64))
    if not isinstance(value, Tensor) or value.dtype == torch.bool or value.is_complex():
        return None
    if value.ndim == 2 and value.shape[1] == 1:
        value = value[:, 0]
    if value.ndim == 1:
        whole = named and value.is_floating_point() and bool((value == value.round()).all())
        return value.long() if whole else (None if value.is_floating_point() else value)
    if value.ndim == 2 and len(value) == count and value.shape[1] > 1 and _is_distribution(value):
        return value.argmax(1)
    return None


def _is_distribution(rows: Tensor) -> bool:
    """One-hot or soft labels: non-negative, each row sums to 1. Several classes at once are not one class."""
    numbers = rows.double()
    return bool((numbers >= 0).all()) and bool(((numbers.sum(1) - 1).abs() < 1e-3).all())


def _is_images(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4


def _last(name: str) -> str:
    return name.rpartition(".")[2].removesuffix(_KEY)


def _place(name: str) -> str:
    return f"position {name}" if name.isdigit() else name.replace(_KEY, "")


def _described(value: Any) -> str:
    return f"tensor {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
