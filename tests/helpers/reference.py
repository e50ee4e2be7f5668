"""GMAR the expensive way: attention maps materialised, plain autograd, full matrix products.

Written for these tests alone; shares no code with the package. The caller says which rows the classifier reads.
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn.functional as F


@contextmanager
def materialised(maps, values=None):
    """Replace the attention kernel by an explicit softmax and collect every map, attached to the graph."""

    def explicit(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if enable_gqa:
            k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
            v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
        scores = q @ k.transpose(-2, -1) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
        if is_causal:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(hidden, -math.inf)
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                scores = scores.masked_fill(~attn_mask, -math.inf)
            else:
                scores = scores + attn_mask
        attention = scores.softmax(-1)
        if not attention.requires_grad:
            attention.requires_grad_()
        maps.append(attention)
        return attention @ v

    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with mock.patch.object(F, "scaled_dot_product_attention", explicit), torch.enable_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@dataclass
class Reference:
    heatmaps: torch.Tensor
    importance: list  # one (batch, heads) per layer
    row: torch.Tensor
    contribution: list  # one (batch, heads) per layer
    head_maps: list  # one (batch, heads, tokens) per layer, gated by the positive gradient
    plain_head_maps: list


def reference(
    model,
    images,
    targets=None,
    *,
    norm="l1",
    rollout="gradient",
    residual=1.0,
    read="class",
    prefix=1,
    grid=None,
    parallel=1,
):
    """GMAR by the definition.

    Args:
        read: "class" (row 0), "mean" (mean over the patch rows), "all" (mean over all rows), "pool" (the last
            map is a one-query attention pool), or a tensor of row weights.
        parallel: Attention calls per block that sit at one depth.
    """
    maps = []
    with materialised(maps):
        output = model(**images) if isinstance(images, dict) else model(images)
        logits = getattr(output, "logits", output)
        targets = logits.argmax(-1) if targets is None else targets
        score = logits[torch.arange(len(logits)), targets].sum()
        grads = torch.autograd.grad(score, maps, allow_unused=True)
    grads = [torch.zeros_like(a) if g is None else g for a, g in zip(maps, grads, strict=True)]
    maps = [a.detach() for a in maps]
    l1 = [g.abs().sum((-2, -1)) for g in grads]
    importance = [g.square().sum((-2, -1)).sqrt() for g in grads] if norm == "l2" else l1
    uniform = norm == "uniform" or rollout == "rollout"
    weights = [torch.ones_like(i) if uniform else i for i in importance]
    weights = [w / w.sum(-1, keepdim=True) for w in weights]
    weighted = [
        (w[:, :, None, None] * ((a * g).clamp(min=0) if rollout == "gradient" else a)).sum(1)
        for w, a, g in zip(weights, maps, grads, strict=True)
    ]
    start = None
    if read == "pool":
        start = (weights[-1][:, :, None, None] * maps[-1]).sum(1)[:, 0]
        weighted = weighted[:-1]
    weighted = [sum(weighted[i : i + parallel]) / parallel for i in range(0, len(weighted), parallel)]
    product = full_rollout(weighted, rollout, residual)
    tokens = product.shape[-1]
    if start is None:
        start = row_weights(read, tokens, prefix).to(product)
        start = start.expand(len(product), -1)
    row = (start[:, None] @ product)[:, 0]
    heatmaps = row if grid is None else row[:, prefix:].reshape(len(row), *grid)
    gated = [(a * g).clamp(min=0) for a, g in zip(maps, grads, strict=True)]
    return Reference(
        heatmaps,
        importance,
        row,
        [(a * g).sum((-2, -1)) for a, g in zip(maps, grads, strict=True)],
        [read_rows(a, start) for a in gated],
        [read_rows(a, start) for a in maps],
    )


def read_rows(attention, start):
    """The rows of each head's map that the readout attends with; the one row there is of an attention pool."""
    if attention.shape[-2] == 1:
        return attention[:, :, 0]
    return torch.einsum("bi,bhij->bhj", start, attention)


def row_weights(read, tokens, prefix):
    if isinstance(read, torch.Tensor):
        return read
    weights = torch.zeros(tokens)
    if read == "class":
        weights[0] = 1
    elif read == "mean":
        weights[prefix:] = 1 / (tokens - prefix)
    elif read == "all":
        weights[:] = 1 / tokens
    return weights


def full_rollout(weighted, rollout, residual):
    identity = torch.eye(weighted[0].shape[-1]).to(weighted[0])
    product = identity.expand_as(weighted[0])
    if rollout == "last_layer":
        return weighted[-1]
    for attention in weighted:
        if rollout == "paper":  # R <- R A + residual I, the identity counted from the start
            product = product @ attention + residual * identity
        elif rollout in ("flow", "rollout"):  # last layer leftmost, rows sum to one
            mixed = attention + residual * identity
            product = (mixed / mixed.sum(-1, keepdim=True)) @ product
        else:
            product = (residual * identity + attention) @ product
    return product


def relative_error(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())
