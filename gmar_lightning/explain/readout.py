"""Which tokens the classifier reads, and how: the row that a rollout starts from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gmar_lightning.explain.attention import AttentionCall, Recording, reaches
from gmar_lightning.explain.errors import CutOffError, UnsupportedModelError, WrongModuleError
from gmar_lightning.explain.intercept import USES_WEIGHTS
from gmar_lightning.explain.refusals import check_reached
from gmar_lightning.explain.tokens import direction
from gmar_lightning.explain.trace import as_tokens

# A head reads one token, the mean of some, or both (class token beside the mean); never a mixture of many.
_MOST_READ_GROUPS = 2
# Gradient at rows that nobody reads, relative to the largest, that is rounding (a Fourier transform and back).
_STRAY = 1e-6


def readout(found: Recording, score: Tensor, image: Tensor | None) -> Tensor:
    """The row of tokens that the classifier reads, `(batch, tokens)`; NaN for an image without finite logits."""
    read = last_tokens(found, score, image)
    found.trace.tokens.read_place = found.trace.tokens.place(read)
    last = found.calls[-1]
    if last.is_pool:
        return last.q.new_ones(len(last.q), 1)
    grad = _token_grad(score, read, last)
    finite = grad.isfinite().flatten(1).all(-1)
    if (grad.flatten(1).abs().amax(-1).eq(0) & finite).any():
        grad = torch.where(finite[:, None, None], _grad_before_head(found, image), torch.nan)
    rows = readout_rows(grad.masked_fill(~finite[:, None, None], 1.0))
    if ((rows > 0).sum(-1) > 1).any():
        _check_weights(found, score, image)
    if (rows > 0).float().mean() > 0.5:
        _check_last_block(found, read)
    return rows.masked_fill(~finite[:, None], torch.nan)


def without_masked(start: Tensor, grads: Sequence[Tensor]) -> Tensor:
    """The readout row without tokens that a mask hides from the pool.

    A mask that was multiplied in leaves the gradient behind it equal for all tokens; in front of it, where the last
    attention ended, masked tokens have none.

    Args:
        start: The readout row, `(batch, tokens)`.
        grads: Gradients of the logit at the outputs of the last depth, `(batch, heads, tokens, value_dim)`.

    Returns:
        The row, summing to 1; as it was where nothing has a gradient.
    """
    alive = torch.stack([grad.ne(0).any(-1).any(1) for grad in grads]).any(0)
    kept = start * alive
    total = kept.sum(-1, keepdim=True)
    return torch.where(total != 0, kept / total, start)


def _check_weights(found: Recording, score: Tensor, image: Tensor | None) -> None:
    """Refuse weights that tokens are multiplied by, and powers of them, on the way to the pool.

    Behind them the gradient is the same for all tokens, as under a plain mean. What makes all tokens equally long
    (a normalisation written by hand) is no weight.
    """
    sources = _sources(found, image)
    for product, operands in found.trace.tokens.products:
        if product.grad_fn is None or not _weighs_tokens(found, product, operands):
            continue
        if _passes_all(score, product, sources):
            raise UnsupportedModelError(
                f"the classifier reads its tokens with different weights: after {found.calls[-1].name} they are "
                "multiplied by factors of their own or raised to a power before they are pooled (weighted, gated or "
                "generalised-mean pooling), so no row of tokens says how much each is read."
            )


def _weighs_tokens(found: Recording, product: Tensor, operands: tuple[Tensor, ...]) -> bool:
    last = found.calls[-1]
    result = as_tokens(product.detach(), len(last.q), last.q.shape[-2])
    if result is None or not operands:
        return True  # a power
    real = result.ne(0).any(-1)
    constant, flat = [], []
    for operand in operands:
        try:
            seen = as_tokens(operand.float().expand(product.shape), len(last.q), last.q.shape[-2])
        except RuntimeError:
            return False
        assert seen is not None
        first = seen[torch.arange(len(seen), device=seen.device), real.int().argmax(-1)][:, None]
        constant.append(not ((seen - first).abs().amax(-1) * real).gt(1e-6 * first.abs().max()).any())
        flat.append(bool((seen == seen[..., :1]).all()))
    # The same for all tokens that are left: a mask, or weights per channel. Unless it is the tokens that are all
    # alike (collapsed), and the other factor, one number per token, weighs them.
    if all(constant) or any(constant[i] and not flat[1 - i] for i in (0, 1)):
        return False
    size = result.float().square().mean(-1)
    largest = size.amax(-1, keepdim=True)
    return bool((((largest - size) * real) > 1e-2 * largest).any())


def _passes_all(score: Tensor, tokens: Tensor, sources: set[Any]) -> bool:
    if score.grad_fn is None or tokens.grad_fn is None:
        return False
    return not reaches([score.grad_fn], sources, barrier=tokens.grad_fn)


def _sources(found: Recording, image: Tensor | None) -> set[Any]:
    first = found.calls[0]
    sources = {image.grad_fn} if image is not None and image.grad_fn is not None else set()
    return sources | ({first.edge.node} if first.edge is not None else set())


def _token_grad(score: Tensor, tokens: Tensor, call: AttentionCall) -> Tensor:
    (grad,) = torch.autograd.grad(score, tokens, retain_graph=True)
    seen = as_tokens(grad, len(call.q), call.q.shape[-2])
    assert seen is not None
    return seen


def _check_last_block(found: Recording, read: Tensor) -> None:
    """When (nearly) all tokens are read, look at what a single one of them depends on."""
    last = found.calls[-1]
    tokens = as_tokens(read, len(last.q), last.q.shape[-2])
    assert tokens is not None
    one = tokens.shape[1] // 2
    calls = [call for call in found.calls if call.depth == last.depth]
    edges: Any = [call.edge for call in calls]
    score = (tokens[:, one] * direction(tokens)).sum()
    grads = check_reached(calls, torch.autograd.grad(score, edges, retain_graph=True, allow_unused=True))
    grads = [call.arrange(grad) for call, grad in zip(calls, grads, strict=True)]
    only = torch.zeros(tokens.shape[:2], device=tokens.device)
    only[:, one] = 1
    check_rows_apart(calls, grads, only)


def _grad_before_head(found: Recording, image: Tensor | None) -> Tensor:
    """Gradient at the tokens of a fixed function of the classifier's input, for a head whose weights are 0."""
    pooled = found.trace.pooled
    if pooled is not None and pooled.requires_grad:
        score = (pooled * direction(pooled)).sum()
        grad = _token_grad(score, last_tokens(found, score, image), found.calls[-1])
        if grad.flatten(1).abs().amax(-1).gt(0).all():
            return grad
    raise UnsupportedModelError(
        "the logits do not depend on the tokens at all (a head initialised to zero?), and no linear layer on "
        "pooled features was seen that would tell which tokens are read."
    )


def last_tokens(found: Recording, score: Tensor, image: Tensor | None) -> Tensor:
    """The last tensor with one vector per token through which the score depends on the image.

    Args:
        found: What the forward pass showed.
        score: A number computed from the model's output.
        image: The images at the head of the graph, if there are any.

    Returns:
        Tokens `(batch, tokens, channels)` in one of the shapes that `as_tokens` understands.

    Raises:
        UnsupportedModelError: When the score reads anything beside them.
    """
    last, sources = found.calls[-1], _sources(found, image)
    if score.grad_fn is None or not reaches([score.grad_fn], sources):
        raise CutOffError(
            "the logits carry no gradient back to the attention layers: the model's forward detaches its features "
            "or runs under torch.no_grad(). Freeze with requires_grad_(False) instead."
        )
    if reaches([score.grad_fn], found.trace.handed_out - {None}):
        raise UnsupportedModelError(USES_WEIGHTS)
    for tokens in reversed(found.trace.tokens.leaving):
        if tokens.grad_fn is not None and not reaches([score.grad_fn], sources, barrier=tokens.grad_fn):
            return tokens
    raise WrongModuleError(
        f"the logits read more than the tokens that {last.name} ({last.owner}) and its block return: several "
        "layers, a second backbone or branch, or several passes over the image. Name with module= a single "
        "transformer together with its head, or say with a callable target what one branch returns."
    )


def readout_rows(token_grad: Tensor) -> Tensor:
    """The row of tokens that the classifier reads, from the gradient at the tokens it reads them from.

    One token receives gradient under class-token pooling; all pooled tokens receive the same one under mean
    pooling. Distilled models read two tokens, some heads a class token beside a mean: each counts half.

    Args:
        token_grad: Gradient of the logit at the last token tensor, `(batch, tokens, channels)`, non-zero for
            every image.

    Returns:
        `(batch, tokens)`, summing to 1.

    Raises:
        UnsupportedModelError: When tokens are read in more than two ways (max pooling, weighted pooling).
    """
    grad = token_grad.to(torch.promote_types(token_grad.dtype, torch.float32))
    strength = grad.abs().amax(-1)
    tolerance = 1e-3 * strength.amax(-1, keepdim=True)
    unread = strength > 1e-3 * tolerance
    groups, examples = [], []
    for _ in range(_MOST_READ_GROUPS):
        first = unread.int().argmax(-1)
        example = grad[torch.arange(len(grad), device=grad.device), first][:, None]
        alike = unread & ((grad - example).abs().amax(-1) <= tolerance)
        groups.append(alike.to(grad.dtype) / alike.sum(-1, keepdim=True).clamp_min(1))
        examples.append(example * alike.any(-1)[:, None, None])
        unread = unread & ~alike
    # Two winners of a max pool share the channels out between them; two pooled tokens are read on all.
    apart = (examples[0] * examples[1]).abs().amax((1, 2)) == 0
    if unread.any() or (apart & groups[1].any(-1)).any():
        raise UnsupportedModelError(
            "the classifier reads its tokens with different weights (max, weighted or other pooling); known are "
            "one token, the mean of tokens, two tokens, and a token beside a mean."
        )
    total = torch.stack(groups).sum(0)
    return total / total.sum(-1, keepdim=True)


def check_rows_apart(calls: Sequence[AttentionCall], grads: Sequence[Tensor], start: Tensor) -> None:
    """Refuse a model that mixes tokens after its last attention, seen in rows that should get no gradient.

    Args:
        calls: Attention calls of the last depth.
        grads: Gradients of the logit at their outputs, `(batch, heads, tokens, value_dim)`.
        start: The readout row, `(batch, tokens)`.

    Raises:
        UnsupportedModelError: When the logit depends on rows of the last attention that nobody reads.
    """
    for call, grad in zip(calls, grads, strict=True):
        strength = grad.abs().amax((1, 3)).float()
        stray = (strength * (start == 0)).amax(-1)
        if (stray > _STRAY * strength.amax(-1)).any():
            raise UnsupportedModelError(
                f"after {call.name} ({call.owner}) the classifier depends on tokens it does not read: something "
                "beside attention mixes the tokens (a linear layer over positions, gating, normalisation over "
                "tokens), which a rollout of attention maps alone would miss."
            )
