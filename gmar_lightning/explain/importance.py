"""What each head does: how strongly the explained logit depends on its map, and what the map itself says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gmar_lightning.explain.attention import AttentionCall
from gmar_lightning.explain.intercept import at_least_float32
from gmar_lightning.explain.tokens import TokenLayout

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
    grad, value = at_least_float32(output_grad), call.per_head("v")
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


def query_chunks(call: AttentionCall) -> Iterator[slice]:
    """Slices of query rows, small enough that no block of the map outgrows a fixed size."""
    batch, heads, queries, _ = call.q.shape
    rows = max(1, _CHUNK_ELEMENTS // (batch * heads * call.k.shape[-2]))
    for start in range(0, queries, rows):
        yield slice(start, min(start + rows, queries))


@dataclass(frozen=True)
class Companions:
    """Signals per head that importance is blind to, each `(batch, heads)`.

    Attributes:
        entropy: Entropy of a query's attention, mean over queries, as a share of its largest possible value:
            1 is uniform attention, 0 is attention to one token.
        distance: Mean distance in patches between a patch and what it attends to; NaN without a patch grid.
        output_norm: Frobenius norm of the head's output.
    """

    entropy: Tensor
    distance: Tensor
    output_norm: Tensor


def companion_signals(call: AttentionCall, layout: TokenLayout, keys: Tensor | None = None) -> Companions:
    """Entropy, mean attention distance and output norm of one attention call.

    Args:
        call: The recorded call.
        layout: Where the patches are.
        keys: Optional `(batch, keys)`, 0 where a token is padding.

    Returns:
        The signals, `(batch, heads)` each.
    """
    batch, heads, queries, _ = call.q.shape
    real = torch.ones(batch, call.k.shape[-2], device=call.q.device) if keys is None else keys.float()
    asked = real if queries == real.shape[-1] else real.new_ones(batch, queries)
    entropy = torch.zeros(batch, heads, device=call.q.device)
    reach, mass = torch.zeros_like(entropy), torch.zeros_like(entropy)
    for rows in query_chunks(call):
        attention = call.attention(rows).float()
        spread = torch.special.entr(attention).sum(-1)
        entropy += (spread * asked[:, None, rows]).sum(-1)
        if layout.grid is not None and queries > 1:
            far, is_patch = _distances(layout.grid, layout.prefix, rows, call.q.device)
            patches = slice(layout.prefix, layout.prefix + far.shape[-1])
            on_patches = attention[..., patches] * is_patch[:, None]
            reach += (on_patches * far).sum((-2, -1))
            mass += on_patches.sum((-2, -1))
    largest = real.sum(-1).clamp_min(2).log()[:, None]
    entropy = entropy / asked.sum(-1)[:, None] / largest
    distance = torch.where(mass > 0, reach / mass, torch.nan)
    norm = call.output.detach().float().square().sum((-2, -1)).sqrt()
    return Companions(entropy, distance, norm)


def _distances(
    grid: tuple[int, int], prefix: int, rows: slice, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Distance in patches from each of some queries to every patch, and which of them are patches."""
    index = torch.arange(grid[0] * grid[1], device=device)
    places = torch.stack([index // grid[1], index % grid[1]], -1).float()
    queries = torch.arange(rows.start, rows.stop, device=device) - prefix
    is_patch = (queries >= 0) & (queries < len(index))
    return torch.cdist(places[queries.clamp(0, len(index) - 1)], places), is_patch.float()
