"""Scores per head: how strongly the explained number depends on a head's map, and what the head adds to it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from gmar_lightning.explain.attention import AttentionCall
from gmar_lightning.explain.blocks import Block
from gmar_lightning.explain.intercept import at_least_float32

Norm = Literal["l1", "l2", "uniform"]


def head_weights(importance: Tensor) -> Tensor:
    """Importance divided by its sum over the heads of the layer.

    Args:
        importance: `(..., heads)`, non-negative; NaN where a layer has fewer heads than the widest one.

    Returns:
        The same shape, summing to 1 over heads. A layer that receives no gradient at all weighs its heads
        equally; NaN stays NaN.
    """
    total = importance.nansum(-1, keepdim=True)
    heads = importance.isnan().logical_not().sum(-1, keepdim=True)
    fair = torch.ones_like(importance) / heads
    weights = torch.where(total > 0, importance / total, fair)
    return weights.masked_fill(importance.isnan(), torch.nan)


def head_shares(importance: Tensor) -> Tensor:
    """Each head's share of its layer's importance, as it is recorded, judged and shown.

    Unlike `head_weights`, which has to hand a rollout something to average with, a layer that receives no
    gradient has nothing to share.

    Args:
        importance: `(..., layers, heads)`, non-negative; NaN where a layer has fewer heads than the widest one.

    Returns:
        The same shape: sums to 1 over the heads of a layer, or 0 everywhere in a layer without gradient. NaN
        where importance is not finite.
    """
    known = importance.isfinite()
    total = importance.where(known, 0).sum(-1, keepdim=True)
    return torch.where(total > 0, importance / total, 0.0).masked_fill(~known, torch.nan)


def equal_weights(importance: Tensor) -> Tensor:
    """The same weight for every head of a layer; NaN where importance is NaN."""
    return head_weights(torch.ones_like(importance).masked_fill(importance.isnan(), torch.nan))


def absolute_sum(block: Block, map_grad: Tensor, keys: Tensor | None) -> Tensor:
    """Sum of `|dy/dA|` over a block, `(images, heads)`: its part of the L1 importance (arXiv 2504.19414).

    Args:
        block: Which part of the layer.
        map_grad: `dy/dA`, `(images, heads, rows, keys)`.
        keys: Optional `(batch, keys)`, 0 where a key is padding and does not count.
    """
    if keys is None:
        return map_grad.abs().sum((-2, -1))
    return (map_grad.abs().sum(-2) * keys[block.images, None].to(map_grad.dtype)).sum(-1)


def gram_norm(call: AttentionCall, output_grad: Tensor, keys: Tensor | None = None) -> Tensor:
    """Root of the summed squares of `dy/dA = (dy/dO) V^T`, the L2 importance, `(batch, heads)`.

    It is the inner product of the two Gram matrices `dO^T dO` and `V^T V`: no (queries, keys) product is formed.

    Args:
        call: The recorded attention call.
        output_grad: `dy/dO`, `(batch, heads, queries, value_dim)`.
        keys: Optional `(batch, keys)`, 0 where a key is padding and does not count.
    """
    grad, value = at_least_float32(output_grad), call.per_head("v")
    if keys is not None:
        value = value * keys[:, None, :, None]
    gram = (grad.mT @ grad) * (value.mT @ value)
    return gram.sum((-2, -1)).clamp_min(0).sqrt()  # rounding may leave -0.0


def head_contribution(call: AttentionCall, output_grad: Tensor) -> Tensor:
    """What each head adds to the explained number, to first order: `sum dO * O`, `(batch, heads)`, signed.

    Equal to `sum A * dy/dA`, and to the derivative with respect to a gate on the head at its value of 1
    (Michel et al. 2019, arXiv 1905.10650). Positive heads argue for the class, negative ones against it.
    """
    output = at_least_float32(call.output.detach())
    return (at_least_float32(output_grad) * output).sum((-2, -1))
