"""A layer's attention map and its gradient, visited once, in blocks that stay in the cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gmar_lightning.explain.attention import AttentionCall
from gmar_lightning.explain.intercept import at_least_float32, masked_scores

# Elements of one (images, heads, rows, keys) block. On a CPU a block of 1 MiB in float32 and its gradient stay
# in the second-level cache while every number is read off them; a GPU wants few and large kernels, 64 MiB.
_BLOCK_ELEMENTS = {"cpu": 2**18}
_BLOCK_ELEMENTS_ELSEWHERE = 2**24


@dataclass(frozen=True)
class Block:
    """Some images, heads and query rows of a layer, with all keys."""

    images: slice
    heads: slice
    rows: slice

    def of_queries(self, tensor: Tensor) -> Tensor:
        """Part of `(batch, heads, queries, dim)`, in at least float32."""
        return at_least_float32(tensor[self.images, self.heads, self.rows])

    def of_keys(self, tensor: Tensor, groups: int) -> Tensor:
        """Part of `(batch, key_heads, keys, dim)`, one entry per query head, in at least float32."""
        return at_least_float32(self._of_heads(tensor, groups))

    def _of_heads(self, tensor: Tensor, groups: int) -> Tensor:
        if groups == 1:
            return tensor[self.images, self.heads]
        heads = torch.arange(self.heads.start, self.heads.stop, device=tensor.device) // groups
        return tensor[self.images, heads]

    def scores(self, call: AttentionCall) -> Tensor:
        """What the softmax is taken of, `(images, heads, rows, keys)`; -inf where a mask hides a key."""
        batch, heads, queries, _ = call.q.shape
        key, mask = self._of_heads(call.k, heads // call.k.shape[1]), call.mask
        if mask is not None:
            mask = mask.expand(batch, heads, queries, call.k.shape[-2])[self.images, self.heads]
        return masked_scores(call.q[self.images, self.heads], key, mask, call.scale, call.causal, self.rows)

    def attention(self, call: AttentionCall, scores: Tensor | None) -> Tensor:
        """The map, `(images, heads, rows, keys)`, from its scores, or as the model computed it by hand."""
        if call.weights is not None:
            # A copy: what reads the map works on it in place.
            return at_least_float32(call.weights[self.images, self.heads, self.rows]).clone()
        return (self.scores(call) if scores is None else scores).softmax(-1)


def blocks(call: AttentionCall) -> Iterator[Block]:
    """Cut a layer into blocks of bounded size: several images, or heads of one image, or rows of one head."""
    batch, heads, queries, _ = call.q.shape
    keys = call.k.shape[-2]
    limit = _BLOCK_ELEMENTS.get(call.q.device.type, _BLOCK_ELEMENTS_ELSEWHERE)
    rows = min(queries, max(1, limit // keys))
    beside = min(heads, max(1, limit // (queries * keys)))
    images = min(batch, max(1, limit // (heads * queries * keys)))
    # Rows outermost, so that what depends on rows alone (distances) is made once for all images and heads.
    for row in range(0, queries, rows):
        for image in range(0, batch, images):
            for head in range(0, heads, beside):
                yield Block(
                    slice(image, min(image + images, batch)),
                    slice(head, min(head + beside, heads)),
                    slice(row, min(row + rows, queries)),
                )
