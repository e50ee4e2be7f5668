"""Typical levels of heads and layers, robust to the few that go astray."""

from __future__ import annotations

import math

import numpy as np
import torch

from gmar_lightning.explain.importance import head_shares

MOST = 0.75  # "the model" shrank when this fraction of its layers did


def shares(raw: np.ndarray) -> np.ndarray:
    """`head_shares` of an array `(layers, heads)`."""
    return head_shares(torch.from_numpy(raw)).numpy()


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
