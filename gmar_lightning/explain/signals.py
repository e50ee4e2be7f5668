"""What a head's map and output say of its health, read off the same pass as its importance."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from gmar_lightning.explain.attention import AttentionCall
from gmar_lightning.explain.blocks import Block
from gmar_lightning.explain.intercept import at_least_float32, one_per_head
from gmar_lightning.explain.tokens import TokenLayout

SIGNALS = {
    "entropy": "Entropy of a query's attention, mean over queries, as a share of its largest possible value: "
    "1 is uniform attention, 0 attention to one token (entropy collapse: arXiv 2303.06296).",
    "distance": "Mean distance in patches between a patch and what it attends to (Dosovitskiy et al. 2021); "
    "NaN without a patch grid.",
    "logit_max": "Largest pre-softmax logit, masked keys left out (QK-clip: arXiv 2507.20534).",
    "sink_mass": "Attention to the most attended key, mean over queries, 0 to 1.",
    "sink_token": "Index of that key on the token axis.",
    "sink_value_norm": "Norm of that key's value by the mean norm of the other keys' values: far below 1 is a "
    "no-op sink, otherwise the sink broadcasts (arXiv 2606.08105).",
    "output_norm": "Frobenius norm of the head's output.",
    "value_norm": "Root mean square of the norms of the head's values over the keys.",
    "gradient_norm": "Frobenius norm of the gradient at the head's output.",
    "output_rank": "Effective rank of the head's output: participation ratio of its squared singular values, "
    "1 to min(queries, value_dim).",
    "similarity": "Cosine between the head's output and that of the head of its layer nearest to it.",
    "value_similarity": "Mean cosine between the values of two tokens of the head, squared mean direction, 0 to 1: "
    "1 when the values are constant.",
    "token_similarity": "The same for the values of all heads together, a linear image of the tokens that enter the "
    "layer: 1 when tokens became alike (rank collapse: arXiv 2103.03404); one number per layer, repeated.",
}


class MapSignals:
    """Sums over the blocks of one layer's map, for the signals that need the map itself."""

    def __init__(self, call: AttentionCall, layout: TokenLayout, keys: Tensor | None) -> None:
        batch, heads, queries, _ = call.q.shape
        dtype = torch.promote_types(call.q.dtype, torch.float32)
        self.layout, self.queries = layout, queries
        self.real = call.q.new_ones(batch, call.k.shape[-2], dtype=dtype) if keys is None else keys.to(dtype)
        # A pool's query is no token: it counts even where the token at its place is padding.
        asked = self.real if queries == self.real.shape[-1] else self.real.new_ones(batch, queries)
        self.share = asked / asked.sum(-1, keepdim=True)
        self.entropy = self.real.new_zeros(batch, heads)
        self.reach, self.mass = torch.zeros_like(self.entropy), torch.zeros_like(self.entropy)
        self.peak = torch.full_like(self.entropy, -torch.inf)
        self._far: tuple[slice, Tensor] | None = None

    def add(self, block: Block, scores: Tensor | None, attention: Tensor) -> None:
        """Take in one block, its pre-softmax scores (None where the model computes them by hand) and its map."""
        part = block.images, block.heads
        share = self.share[block.images, None, block.rows]
        peak = attention.new_tensor(torch.nan) if scores is None else scores.amax((-2, -1))
        self.peak[part] = torch.maximum(self.peak[part], peak)
        self.entropy[part] += (torch.special.entr(attention).sum(-1) * share).sum(-1)
        if self.layout.grid is not None and self.queries > 1:
            far = self._distances(block.rows, attention)
            # Both sums are products of the flattened map with a fixed column: the map is read once.
            sums = attention.flatten(-2) @ far
            self.reach[part] += sums[..., 0]
            self.mass[part] += sums[..., 1]

    def _distances(self, rows: slice, like: Tensor) -> Tensor:
        """`(rows * keys, 2)`: distance in patches from query to key, and whether both are patches."""
        if self._far is None or self._far[0] != rows:
            assert self.layout.grid is not None
            self._far = rows, patch_distances(self.layout.grid, self.layout.prefix, rows, like)
        return self._far[1]

    def results(self, call: AttentionCall, output_grad: Tensor, mean_row: Tensor) -> dict[str, Tensor]:
        """All signals of the layer, `(batch, heads)` each.

        Args:
            call: The recorded call.
            output_grad: `dy/dO`.
            mean_row: Mean over queries of each head's map, `(batch, heads, keys)`.
        """
        largest = self.real.sum(-1).clamp_min(2).log()[:, None]
        return {
            "entropy": self.entropy / largest,
            "distance": torch.where(self.mass > 0, self.reach / self.mass, torch.nan),
            "logit_max": self.peak,
            **_sink(mean_row, one_per_head(call.v, call.q.shape[1]), self.real),
            **_of_output(call, output_grad),
            **_of_values(call, self.real),
        }


def patch_distances(grid: tuple[int, int], prefix: int, rows: slice, like: Tensor) -> Tensor:
    """Distance in patches from some queries to every key, and which pairs are patches, `(rows * keys, 2)`."""
    keys = torch.arange(like.shape[-1], device=like.device) - prefix
    is_patch = (keys >= 0) & (keys < grid[0] * grid[1])
    places = torch.stack([keys.div(grid[1], rounding_mode="floor"), keys % grid[1]], -1).to(like.dtype)
    pairs = (is_patch[rows, None] & is_patch).to(like.dtype)
    far = torch.cdist(places[rows], places, compute_mode="donot_use_mm_for_euclid_dist") * pairs
    return torch.stack([far.flatten(), pairs.flatten()], -1)


def _sink(mean_row: Tensor, value: Tensor, real: Tensor) -> dict[str, Tensor]:
    mass, token = mean_row.max(-1)
    norms = at_least_float32(value).norm(dim=-1) * real[:, None]
    at_sink = norms.gather(-1, token[..., None])[..., 0]
    others = (norms.sum(-1) - at_sink) / (real.sum(-1, keepdim=True) - 1).clamp_min(1)
    return {
        "sink_mass": mass,
        "sink_token": token.to(mass.dtype).masked_fill(mass.isnan(), torch.nan),
        "sink_value_norm": torch.where(others > 0, at_sink / others, torch.nan),
    }


def _of_output(call: AttentionCall, output_grad: Tensor) -> dict[str, Tensor]:
    output = at_least_float32(call.output.detach())
    gram = output.mT @ output if output.shape[-2] > output.shape[-1] else output @ output.mT
    energy = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    flat = functional.normalize(output.flatten(2), dim=-1)
    alike = flat @ flat.mT
    alike = alike - 3 * torch.eye(
        alike.shape[-1], device=alike.device, dtype=alike.dtype
    )  # a head is no other
    lonely = alike.shape[-1] == 1
    return {
        "output_norm": energy.sqrt(),
        "gradient_norm": at_least_float32(output_grad).square().sum((-2, -1)).sqrt(),
        "output_rank": energy.square() / gram.square().sum((-2, -1)).clamp_min(torch.finfo(gram.dtype).tiny),
        "similarity": torch.full_like(energy, torch.nan) if lonely else alike.amax(-1),
    }


def _of_values(call: AttentionCall, real: Tensor) -> dict[str, Tensor]:
    heads = call.q.shape[1]
    value = at_least_float32(call.v)
    squares = (value.square().sum(-1) * real[:, None]).sum(-1) / real.sum(-1, keepdim=True)
    of_head = _mean_cosine(value, real[:, None])
    of_layer = _mean_cosine(value.transpose(1, 2).flatten(2), real)
    return {
        "value_norm": one_per_head(squares.sqrt(), heads),
        "value_similarity": one_per_head(of_head, heads),
        "token_similarity": of_layer[:, None].expand(-1, heads),
    }


def _mean_cosine(vectors: Tensor, real: Tensor) -> Tensor:
    """Mean cosine between two of the `(..., tokens, dim)` vectors, a vector with itself included."""
    mean = (functional.normalize(vectors, dim=-1) * real[..., None]).sum(-2) / real.sum(-1)[..., None]
    return mean.square().sum(-1)
