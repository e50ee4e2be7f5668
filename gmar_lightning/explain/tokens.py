"""Which token is which: derived from what the forward pass and its gradients showed, never assumed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gmar_lightning.explain.attention import AttentionCall, Recording
from gmar_lightning.explain.errors import UnsupportedModelError

__all__ = ["TokenLayout", "check_plain_attention", "readout_rows", "token_layout"]

# Class, distillation, register and prompt tokens together; more than this is some other arrangement.
_MOST_PREFIX_TOKENS = 64
# A head reads one token, the mean of some, or both (class token beside the mean); never a mixture of many.
_MOST_READ_GROUPS = 2


@dataclass(frozen=True)
class TokenLayout:
    """How the token axis maps to the picture.

    Attributes:
        prefix: Tokens in front of the patches (class, distillation, registers).
        grid: Live patch grid `(height, width)`; None for a token sequence without one (text).
    """

    prefix: int
    grid: tuple[int, int] | None


def check_plain_attention(found: Recording, batch: int) -> None:
    """Refuse every model whose rollout is not the product of plain token-to-token attention maps.

    Args:
        found: What a forward pass over `batch` images showed.
        batch: Number of images.

    Raises:
        UnsupportedModelError: Naming the module, its class and the reason.
    """
    if found.softmaxes:
        raise UnsupportedModelError(
            f"attention computed by hand in {_listed(found.softmaxes)}: its maps do not pass "
            "scaled_dot_product_attention (talking heads, a linear or windowed variant, or a module written "
            "without it), so its heads cannot be scored."
        )
    if not found.calls:
        seen = f" {_listed(found.trace.silent)} ran without calling it." if found.trace.silent else ""
        raise UnsupportedModelError(
            f"no attention seen: no call of scaled_dot_product_attention in the forward pass.{seen} "
            "If the transformer sits elsewhere, name it with module=."
        )
    if found.trace.silent:
        raise UnsupportedModelError(
            f"{_listed(found.trace.silent)} ran without calling scaled_dot_product_attention: "
            "part of the attention (linear, channel or windowed attention, or an opaque kernel) is invisible."
        )
    for call in found.calls:
        _check_call(call, batch)
    _check_sequence(found.calls)
    if found.trace.convolutions:
        raise UnsupportedModelError(
            f"tokens are mixed by convolution between the attention layers, in "
            f"{_listed(found.trace.convolutions)}: a rollout of attention maps alone would misplace them."
        )


def _check_call(call: AttentionCall, batch: int) -> None:
    where = f"{call.name} ({call.owner})"
    if call.q.ndim != 4 or call.q.shape[0] != batch:
        raise UnsupportedModelError(
            f"{where} attends with queries of shape {tuple(call.q.shape)} for {batch} images: windowed or merged "
            "attention; expected (batch, heads, tokens, dim) over the whole image."
        )
    if call.shared_qkv:
        raise UnsupportedModelError(
            f"{where} pools without parameters: queries, keys and values are one tensor."
        )
    if call.twin:
        raise UnsupportedModelError(
            f"{where} makes two attention calls at once (differential attention): its true map is a difference of "
            "the two, and a head's share in it is not defined."
        )
    if not call.output.requires_grad:
        raise UnsupportedModelError(
            f"{where} runs under torch.no_grad() inside the model's own forward, so no gradient reaches its map. "
            "Freeze with requires_grad_(False) instead of no_grad(), or name the inner module with module=."
        )


def _check_sequence(calls: list[AttentionCall]) -> None:
    *body, last = calls
    tokens = calls[0].k.shape[-2]
    for layer, call in enumerate(calls):
        queries, keys = call.q.shape[-2], call.k.shape[-2]
        is_pool = call is last and body and queries == 1 and keys == tokens
        if queries != keys and not is_pool:
            raise UnsupportedModelError(
                f"{call.name} ({call.owner}) attends from {queries} queries to {keys} keys at layer {layer}: class "
                "attention, cross attention or pooled keys; rollout needs square maps up to one final "
                "one-query pool."
            )
        if keys != tokens:
            raise UnsupportedModelError(
                f"token count changes at layer {layer}: {call.name} ({call.owner}) sees {keys} tokens after "
                f"{tokens} before (hierarchical, or tokens dropped or merged)."
            )


def token_layout(found: Recording, model: nn.Module, image_size: tuple[int, int] | None) -> TokenLayout:
    """Prefix tokens and live patch grid of a forward pass.

    Args:
        found: What the pass showed.
        model: Asked for its patch size when no convolution cut the patches.
        image_size: Height and width of the images; None for a model that reads no image.

    Raises:
        UnsupportedModelError: When tokens and patches cannot be matched.
    """
    tokens = found.calls[0].k.shape[-2]
    if image_size is None:
        return TokenLayout(0, None)
    grid = found.trace.grid or _grid_from_patch_size(model, image_size)
    if grid is None:
        raise UnsupportedModelError(
            f"no patch grid found for {tokens} tokens: neither a patch-cutting convolution nor a patch_size "
            f"attribute was seen in {type(model).__name__}."
        )
    prefix = tokens - math.prod(grid)
    if not 0 <= prefix <= _MOST_PREFIX_TOKENS:
        what = "channel attention, or tokens dropped" if prefix < 0 else "tokens that are no patches"
        raise UnsupportedModelError(
            f"{found.calls[0].name} ({found.calls[0].owner}) attends over {tokens} positions while the image has "
            f"{grid[0]} x {grid[1]} patches: {what}."
        )
    return TokenLayout(prefix, grid)


def _grid_from_patch_size(model: nn.Module, image_size: tuple[int, int]) -> tuple[int, int] | None:
    for module in model.modules():
        size = getattr(module, "patch_size", None)
        size = (size, size) if isinstance(size, int) else size
        if (
            isinstance(size, (tuple, list))
            and len(size) == 2
            and all(isinstance(s, int) and s > 0 for s in size)
        ):
            return image_size[0] // size[0], image_size[1] // size[1]
    return None


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
    groups = []
    for _ in range(_MOST_READ_GROUPS):
        first = unread.int().argmax(-1)
        example = grad[torch.arange(len(grad), device=grad.device), first][:, None]
        alike = unread & ((grad - example).abs().amax(-1) <= tolerance)
        groups.append(alike / alike.sum(-1, keepdim=True).clamp_min(1))
        unread = unread & ~alike
    if unread.any():
        raise UnsupportedModelError(
            "the classifier reads its tokens with different weights (max, weighted or other pooling); known are "
            "one token, the mean of tokens, two tokens, and a token beside a mean."
        )
    total = torch.stack(groups).sum(0)
    return total / total.sum(-1, keepdim=True)


def _listed(names: list[str]) -> str:
    unique = list(dict.fromkeys(names))
    return ", ".join(unique[:3]) + (f" and {len(unique) - 3} more" if len(unique) > 3 else "")
