"""How strongly the explained logit depends on each head's attention map."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from gmar_lightning.explain.attention import AttentionCall

__all__ = ["Norm", "head_importance", "head_weights", "query_chunks"]

Norm = Literal["l1", "l2", "uniform"]

# Elements of one (batch, heads, chunk, keys) block: 16 MiB in float32, whatever the image size.
_CHUNK_ELEMENTS = 2**22


def head_importance(
    call: AttentionCall, output_grad: Tensor, norm: Norm = "l1", keys: Tensor | None = None
) -> Tensor:
    """Norm of the gradient of the logit with respect to each head's attention map.

    In `O = A V` the map `A` enters nowhere else, so `dy/dA = (dy/dO) V^T`: neither the map nor its gradient
    is needed whole. L1 sums `|dO_i . v_j|` over chunks of queries; L2 is the inner product of the two Gram
    matrices `dO^T dO` and `V^T V`, without any (queries, keys) product.

    Args:
        call: The recorded attention call.
        output_grad: `dy/dO`, `(batch, heads, queries, value_dim)`.
        norm: "l1" (arXiv 2504.19414, the sum of absolute gradients) or "l2" (their root of squares);
            "uniform" weighs heads equally and still reports the L1 norm.
        keys: Optional `(batch, keys)`, 0 where a key is padding and does not count.

    Returns:
        `(batch, heads)`, in float32 (float64 for a float64 model).
    """
    grad, value = _upcast(output_grad), call.per_head("v")
    if keys is not None:
        value = value * keys[:, None, :, None]
    if norm == "l2":
        gram = (grad.mT @ grad) * (value.mT @ value)
        return gram.sum((-2, -1)).clamp_min(0).sqrt()
    total = grad.new_zeros(grad.shape[:2])
    for rows in query_chunks(call):
        total += (grad[:, :, rows] @ value.mT).abs_().sum((-2, -1))
    return total


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


def query_chunks(call: AttentionCall) -> Iterator[slice]:
    """Slices of query rows, small enough that no block of the map outgrows a fixed size."""
    batch, heads, queries, _ = call.q.shape
    rows = max(1, _CHUNK_ELEMENTS // (batch * heads * call.k.shape[-2]))
    for start in range(0, queries, rows):
        yield slice(start, min(start + rows, queries))


def _upcast(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
