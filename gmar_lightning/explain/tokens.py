"""Which token is which: derived from what the forward pass and its gradients showed, never assumed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmar_lightning.explain.attention import AttentionCall, Recording
from gmar_lightning.explain.errors import UnsupportedModelError
from gmar_lightning.explain.trace import as_tokens

# Class, distillation, register and prompt tokens together; with more, or some behind the patches, their place is
# searched for.
_MOST_PREFIX_TOKENS = 64
# How far, in patches, the centre of what a token sees may lie from the centre of its patch.
_MOST_OFFSET = 0.75
# Gradient at other tokens, relative to the largest, that is rounding (a Fourier transform and back).
_STRAY = 1e-6


@dataclass(frozen=True)
class TokenLayout:
    """How the token axis maps to the picture.

    Attributes:
        prefix: Tokens in front of the patches (class, distillation, registers).
        grid: Live patch grid `(height, width)`; None for a token sequence without one (text). Tokens behind
            the patches are what is left over.
    """

    prefix: int
    grid: tuple[int, int] | None


def token_layout(found: Recording, model: nn.Module, image: Tensor | None) -> TokenLayout:
    """Prefix tokens and live patch grid of a forward pass.

    The grid is that of the last convolution before the first attention, or follows from a `patch_size`
    attribute, or from square patches. Which of these holds, and where the patches start on the token axis,
    is settled by the gradient: each patch token must have been computed from its own part of the image.

    Args:
        found: What the pass showed.
        model: Asked for its patch size.
        image: The images `(batch, channels, height, width)` at the head of the graph; None for a model that
            reads no image.

    Raises:
        UnsupportedModelError: When tokens and patches cannot be matched.
    """
    if image is None:
        return TokenLayout(0, None)
    first = found.calls[0]
    tokens, size = first.k.shape[-2], (image.shape[-2], image.shape[-1])
    told = [*found.trace.grids[:1], *_grids_from_patch_size(model, size)]
    grids = list(dict.fromkeys([*told, *found.trace.grids[1:], *_square_patches(tokens, size)]))
    layouts = [
        TokenLayout(prefix, grid)
        for grid in grids
        for prefix in dict.fromkeys((tokens - math.prod(grid), 0))
        if 0 <= tokens - math.prod(grid) <= _MOST_PREFIX_TOKENS
    ]
    seen_by = _what_tokens_see(found, image, layouts[0]) if layouts else None
    if layouts and seen_by is None and layouts[0].grid in told:
        return layouts[0]
    for layout in layouts:
        if seen_by is not None and sees_its_patches(layout, *seen_by):
            return layout
    inside = _among_others(found, image, grids)
    if inside is not None:
        return inside
    if not layouts:
        seen = f"the image has {told[0][0]} x {told[0][1]} patches" if told else "no patch grid was found"
        raise UnsupportedModelError(
            f"{first.name} ({first.owner}) attends over {tokens} positions while {seen}: channel attention, "
            "tokens dropped, or patches cut in a way that neither a convolution nor patch_size shows."
        )
    tried = ", ".join(dict.fromkeys(f"{height} x {width}" for height, width in grids))
    raise UnsupportedModelError(
        f"the {tokens} tokens that {first.name} ({first.owner}) reads are not the image's patches in reading "
        f"order (tried {tried}): a token "
        "depends on another part of the image (permuted, cropped or regrouped patches), so no picture can be "
        "drawn."
    )


def _among_others(found: Recording, image: Tensor, grids: list[tuple[int, int]]) -> TokenLayout | None:
    """The layout when tokens without a part in the image stand before and behind the patches, however many.

    Where the patches begin and end is searched by halves: a few backward passes through the stem alone.
    """
    tokens = found.calls[0].k.shape[-2]
    if not _any_sees(found, image, slice(0, tokens)):
        return None
    first = _search(tokens, lambda end: _any_sees(found, image, slice(0, end + 1)))
    behind = _search(tokens, lambda end: _any_sees(found, image, slice(tokens - 1 - end, tokens)))
    patches = tokens - behind - first
    squares = _square_patches(patches, (image.shape[-2], image.shape[-1]))
    for grid in dict.fromkeys([*grids, *squares]):
        layout = TokenLayout(first, grid)
        if math.prod(grid) == patches:
            seen_by = _what_tokens_see(found, image, layout)
            if seen_by is not None and sees_its_patches(layout, *seen_by):
                return layout
    return None


def _search(count: int, holds: Callable[[int], bool]) -> int:
    """The smallest of `count` numbers for which something holds, that holds for all larger ones."""
    low, high = 0, count - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def _any_sees(found: Recording, image: Tensor, asked: slice) -> bool:
    tokens = found.calls[0].k.shape[-2]
    parts = [part for part in found.entered if part.requires_grad and part.shape[-2] == tokens]
    if not parts:
        return False
    score = torch.stack([(part[:, :, asked] * direction(part)).sum() for part in parts]).sum()
    (grad,) = torch.autograd.grad(score, image, retain_graph=True, allow_unused=True)
    return grad is not None and bool(grad.ne(0).any())


def _grids_from_patch_size(model: nn.Module, size: tuple[int, int]) -> Iterator[tuple[int, int]]:
    for module in model.modules():
        patch = getattr(module, "patch_size", None)
        patch = (patch, patch) if isinstance(patch, int) else patch
        sides = list(patch) if isinstance(patch, (tuple, list)) else []
        if len(sides) == 2 and all(isinstance(side, int) and side > 0 for side in sides):
            yield size[0] // sides[0], size[1] // sides[1]


def _square_patches(tokens: int, size: tuple[int, int]) -> Iterator[tuple[int, int]]:
    for side in range(1, min(size) + 1):
        grid = (size[0] // side, size[1] // side)
        if size[0] % side == size[1] % side == 0 and 0 <= tokens - math.prod(grid) <= _MOST_PREFIX_TOKENS:
            yield grid


def _what_tokens_see(found: Recording, image: Tensor, layout: TokenLayout) -> tuple[list[int], Tensor] | None:
    """Up to two token indices and how strongly they depend on each pixel together, `(height, width)`.

    Asked of what enters the attention itself, queries, keys and values. The gradient passes the tokens on its way
    there, so that mixing in front of the first layer that was seen shows as well.
    """
    first = found.calls[0]
    tokens = first.k.shape[-2]
    patches = tokens - layout.prefix if layout.grid is None else math.prod(layout.grid)
    asked = sorted({layout.prefix + int(patches * 0.35), layout.prefix + int(patches * 0.8)})
    parts = [part for part in found.entered if part.requires_grad and part.shape[-2] == tokens]
    if not parts:
        return None
    # Not a plain sum: the sum over a LayerNorm's output is constant.
    score = torch.stack([(part[:, :, asked] * direction(part)).sum() for part in parts]).sum()
    earlier = [t for t in found.trace.tokens.entering if t.requires_grad and t is not image]
    grad, *others = torch.autograd.grad(score, [image, *earlier], retain_graph=True, allow_unused=True)
    for other in others:
        if other is not None:
            _check_unmixed(len(asked), other, first, {math.prod(grid) for grid in found.trace.grids})
    if grad is None or not grad.isfinite().all() or not grad.any():
        return None
    seen = grad.to(torch.promote_types(grad.dtype, torch.float32)).square().sum((0, 1))
    return asked, seen / seen.sum()


def _check_unmixed(asked: int, grad: Tensor, first: AttentionCall, places: set[int]) -> None:
    """Refuse when so many tokens were computed from more tokens than they are; another order is no mixture."""
    batch, tokens = len(first.k), first.k.shape[-2]
    views = [as_tokens(grad, batch, tokens)]
    if grad.shape[1] == tokens == grad.shape[-1] or grad.shape[-1] in places:
        views.append(
            grad.mT
        )  # as many channels as tokens, in front of the places: not to be told from tokens
    counts = []
    for view in views:
        assert view is not None
        strength = view.detach().abs().nan_to_num(0.0).amax((0, 2))
        counts.append(int((strength > _STRAY * strength.max()).sum()))
    if min(counts) > asked:
        raise UnsupportedModelError(
            f"tokens are mixed outside the attention, before {first.name} ({first.owner}), the first layer seen: a "
            "token there depends on several (attention that does not pass scaled_dot_product_attention, or a gate "
            "or normalisation over tokens), so the picture would be wrong."
        )


def sees_its_patches(layout: TokenLayout, asked: list[int], seen: Tensor) -> bool:
    """Whether some tokens lie where a layout says, by how strongly they depend on each pixel, `(height, width)`."""
    assert layout.grid is not None
    height, width = layout.grid
    cells = [divmod(token - layout.prefix, width) for token in asked]
    if any(row >= height for row, _ in cells):
        return False
    shares = F.adaptive_avg_pool2d(seen[None, None], layout.grid)[0, 0]
    rows = torch.arange(height, device=seen.device)[:, None].expand(height, width)
    columns = torch.arange(width, device=seen.device)[None].expand(height, width)
    places = torch.stack([rows, columns], -1).flatten(0, 1).to(shares.dtype)
    centres = torch.tensor(cells, device=seen.device, dtype=shares.dtype)
    nearest = torch.cdist(places, centres).argmin(-1)
    for index, centre in enumerate(centres):
        share = shares.flatten() * (nearest == index)
        offset = (share[:, None] * places).sum(0) / share.sum() - centre
        if not offset.abs().max() <= _MOST_OFFSET:
            return False
    return True


def direction(features: Tensor) -> Tensor:
    """Weights per channel of a fixed score; the plain sum of a LayerNorm's output would be constant."""
    return torch.arange(features.shape[-1], device=features.device).cos().to(features.dtype)
