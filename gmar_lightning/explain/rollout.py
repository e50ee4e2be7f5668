"""Attention rollout as a row vector: the full (tokens, tokens) product is never formed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from gmar_lightning.explain.attention import AttentionCall
from gmar_lightning.explain.blocks import blocks

Rollout = Literal["gradient", "paper", "flow", "rollout", "last_layer"]


def forms_of(rollout: Rollout | Sequence[Rollout]) -> tuple[Rollout, ...]:
    """The forms that are asked for, the first one first, none twice.

    Raises:
        ValueError: With the allowed values.
    """
    forms = (rollout,) if isinstance(rollout, str) else tuple(dict.fromkeys(rollout))
    allowed = get_args(Rollout)
    for form in forms:
        if form not in allowed:
            raise ValueError(f"rollout={form!r} is unknown; choose from {', '.join(map(repr, allowed))}")
    if not forms:
        raise ValueError(f"rollout names no form; choose from {', '.join(map(repr, allowed))}")
    return forms


class BackwardRows:
    """The rows of the forms that run from the last layer to the first, all in one pass.

    `e` is the start row, `A` the head-weighted map of a depth (the mean over its parallel calls):

    - "gradient" (with uniform weights Chefer et al. 2021): `r <- residual r + r sum_h w_h (dy/dA_h * A_h)^+`.
    - "flow" (Abnar & Zuidema 2020): `r <- normalise(residual r + r A)`; residual 1 is their `(A + I) / 2`.
    - "rollout": "flow" with the same weight for every head, plain attention rollout.
    - "last_layer": `r <- e A` of the last depth alone.

    Attributes:
        rows: For each form its row so far, `(batch, tokens)`.
    """

    def __init__(self, forms: Sequence[str], start: Mapping[str, Tensor], residual: float) -> None:
        self.rows: dict[str, Tensor] = {form: start[form] for form in forms if form != "paper"}
        self._residual = residual
        self._depth: int | None = None
        self._pulled: dict[str, list[Tensor]] = {}
        self._depths_done = 0

    def at(self, depth: int) -> dict[str, Tensor]:
        """The rows that a layer at `depth` is to be pulled by; layers come from the last depth to the first."""
        if depth != self._depth:
            self.close()
            self._depth = depth
        return {form: row for form, row in self.rows.items() if form != "last_layer" or not self._depths_done}

    def take(self, pulled: Mapping[str, Tensor]) -> None:
        """Take in `row A`, head-weighted, `(batch, tokens)`, of one layer at the present depth."""
        for form, row in pulled.items():
            self._pulled.setdefault(form, []).append(row)

    def close(self) -> dict[str, Tensor]:
        """Finish the present depth; returns the rows."""
        for form, pulled in self._pulled.items():
            row = torch.stack(pulled).mean(0)
            if form != "last_layer":
                row = self._residual * self.rows[form] + row
            if form in ("flow", "rollout"):
                row = row / row.sum(-1, keepdim=True)
            self.rows[form] = row
        self._depths_done += bool(self._pulled)
        self._pulled = {}
        return self.rows


def paper_row(
    start: Tensor, depths: Sequence[Sequence[tuple[AttentionCall, Tensor]]], residual: float
) -> Tensor:
    """The form of arXiv 2504.19414 read literally: first layer to last, `r <- r A + residual e`.

    It runs against the backward pass, and every layer's head weights are needed before its row is: where the
    maps were not kept, this is a second visit that computes `A` again (one `q k^T` per layer: 2 % of a forward
    on ViT-B/16 at 224 px).

    Args:
        start: The readout row `e`, `(batch, tokens)`.
        depths: For each depth, first to last, its calls with their head weights `(batch, heads)`.
        residual: Weight of the residual path.

    Returns:
        `(batch, tokens)`, non-negative for a non-negative start.
    """
    row = start
    for depth in depths:
        pulled = [pull(row, call, weights) for call, weights in depth]
        row = torch.stack(pulled).mean(0) + residual * start
    return row


def pull(row: Tensor, call: AttentionCall, weights: Tensor) -> Tensor:
    """`sum_h weights_h * row @ A_h`, `(batch, keys)`, for a row `(batch, queries)`."""
    pulled = row.new_zeros(row.shape[0], call.k.shape[-2])
    for block in blocks(call):
        attention = block.attention(call, None)
        share = weights[block.images, block.heads, None] * row[block.images, None, block.rows]
        pulled[block.images] += (share.flatten(1)[:, None] @ attention.flatten(1, 2))[:, 0]
    return pulled


def to_grid(row: Tensor, prefix: int, grid: tuple[int, int]) -> Tensor:
    """Take the patches behind the prefix tokens and fold them into the grid, `(..., grid_h, grid_w)`."""
    return row[..., prefix : prefix + grid[0] * grid[1]].unflatten(-1, grid)
