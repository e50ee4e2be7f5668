"""Attention rollout as a row vector: the full (tokens, tokens) product is never formed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from gmar_lightning.explain.attention import AttentionCall
from gmar_lightning.explain.importance import query_chunks

Rollout = Literal["paper", "flow", "gradient", "last_layer"]
Step = tuple[AttentionCall, Tensor, Tensor]  # a call, its head weights (batch, heads), dy/dO


def start_row(readout: Tensor, pool: AttentionCall | None = None, weights: Tensor | None = None) -> Tensor:
    """Where the rollout starts: the tokens the classifier reads.

    Args:
        readout: `(batch, tokens)`, one for the class token, equal parts for the tokens of a mean; over the
            queries of the pool when there is one.
        pool: A final attention pool with one query.
        weights: `(batch, heads)` of the pool.

    Returns:
        `(batch, tokens)`: the readout itself, or the pool's own head-weighted row.
    """
    if pool is None or weights is None:
        return readout
    return (weights[:, :, None] * pool.attention()[:, :, 0]).sum(1)


def pull(row: Tensor, call: AttentionCall, weights: Tensor, output_grad: Tensor | None = None) -> Tensor:
    """One step of the rollout: `row` times the head-weighted attention map, in chunks of queries.

    Args:
        row: `(batch, queries)`.
        call: The attention call whose map is pulled through.
        weights: `(batch, heads)`.
        output_grad: `dy/dO`; given, each map is gated by its own positive gradient, `(dy/dA * A)^+`.

    Returns:
        `(batch, keys)`: `sum_h weights_h * row @ A_h`.
    """
    pulled = row.new_zeros(row.shape[0], call.k.shape[-2])
    for rows in query_chunks(call):
        attention = call.attention(rows)
        if output_grad is not None:
            grad = output_grad[:, :, rows].to(attention.dtype) @ call.per_head("v").mT
            attention = attention.mul_(grad).clamp_min_(0)
        share = weights[:, :, None] * row[:, None, rows]
        pulled += (share.flatten(1)[:, None] @ attention.flatten(1, 2))[:, 0]
    return pulled


def roll_out(
    start: Tensor,
    depths: Sequence[Sequence[Step]],
    form: Rollout,
    residual: float = 1.0,
) -> Tensor:
    """Relevance of every token for the readout row.

    `e` is the start row, `A` the head-weighted map of a depth (the mean over its parallel calls):

    - "paper" (arXiv 2504.19414, read literally): first to last, `r <- r A + residual e`.
    - "flow" (Abnar & Zuidema 2020): last to first, `r <- normalise(residual r + r A)`; residual 1 is their
      `(A + I) / 2`.
    - "gradient" (with uniform weights Chefer et al. 2021): last to first,
      `r <- residual r + r sum_h w_h (dy/dA_h * A_h)^+`.
    - "last_layer": `r <- e A` of the last depth alone.

    Args:
        start: The readout row, `(batch, tokens)`.
        depths: For each depth its `(call, weights, output_grad)`; the gradient is used by "gradient" only.
        form: Which recursion.
        residual: Weight of the residual path.

    Returns:
        `(batch, tokens)`, non-negative for a non-negative start.
    """
    if form == "paper":
        row = start
        for depth in depths:
            row = _pull_depth(row, depth, gated=False) + residual * start
        return row
    if form == "last_layer":
        return _pull_depth(start, depths[-1], gated=False) if depths else start
    row = start
    for depth in reversed(depths):
        row = residual * row + _pull_depth(row, depth, gated=form == "gradient")
        if form == "flow":
            row = row / row.sum(-1, keepdim=True)
    return row


def to_grid(row: Tensor, prefix: int, grid: tuple[int, int]) -> Tensor:
    """Take the patches behind the prefix tokens and fold them into the grid, `(batch, grid_h, grid_w)`."""
    return row[:, prefix : prefix + grid[0] * grid[1]].unflatten(-1, grid)


def _pull_depth(row: Tensor, depth: Sequence[Step], gated: bool) -> Tensor:
    pulled = [pull(row, call, weights, grad if gated else None) for call, weights, grad in depth]
    return torch.stack(pulled).mean(0)
