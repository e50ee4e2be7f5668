"""What the attention maps say beside importance: entropy, distance and output norm of each head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gmar_lightning.explain.attention import AttentionCall
from gmar_lightning.explain.importance import query_chunks
from gmar_lightning.explain.tokens import TokenLayout

__all__ = ["Companions", "companion_signals"]


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
