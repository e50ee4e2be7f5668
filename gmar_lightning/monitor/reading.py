"""What is handed to the collapse detector, checked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def as_array(importance: torch.Tensor | np.ndarray, shape: tuple[int, ...] | None) -> np.ndarray:
    """A float64 copy of importance `(layers, heads)`.

    Raises:
        ValueError: Another number of dimensions, no entries, or not `shape` where one is given.
    """
    if isinstance(importance, torch.Tensor):
        importance = importance.detach().to("cpu", torch.float64).numpy()
    raw = np.array(importance, dtype=np.float64)
    if raw.ndim != 2 or 0 in raw.shape:
        raise ValueError(f"importance must have shape (layers, heads), got {raw.shape}")
    if shape is not None and raw.shape != shape:
        raise ValueError(f"importance changed shape from {shape} to {raw.shape}")
    return raw


def checked_names(raw: np.ndarray, layers: Sequence[str] | None, before: list[str]) -> list[str]:
    """One name for each layer; those known before, or made up, where none are given.

    Raises:
        ValueError: More or fewer names than layers.
    """
    if layers is None:
        return before or [f"layer {layer}" for layer in range(len(raw))]
    if len(layers) != len(raw):
        raise ValueError(f"{len(layers)} layer names for importance of shape {raw.shape}")
    return [str(name) for name in layers]


def nonfinite(raw: np.ndarray, present: np.ndarray | None) -> np.ndarray:
    """Entries that should be numbers and are not, `(layers, heads)`.

    NaN is padding where no head was ever seen; at the first probe (`present` is None), behind the last
    number of a layer.
    """
    finite = np.isfinite(raw)
    if present is None:
        present = np.flip(np.logical_or.accumulate(np.flip(finite, 1), axis=1), 1)
        present = present | ~finite.any(axis=1, keepdims=True)
    return (present & ~finite) | np.isinf(raw)
