"""Which token is which: derived from what the forward pass and its gradients showed, never assumed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmar_lightning.explain.attention import Recording
from gmar_lightning.explain.errors import UnsupportedModelError
from gmar_lightning.explain.trace import as_tokens

# Class, distillation, register and prompt tokens together; more than this is some other arrangement.
_MOST_PREFIX_TOKENS = 64
# How far, in patches, the centre of what a token sees may lie from the centre of its patch.
_MOST_OFFSET = 0.75


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
    if not layouts:
        seen = f"the image has {told[0][0]} x {told[0][1]} patches" if told else "no patch grid was found"
        raise UnsupportedModelError(
            f"{first.name} ({first.owner}) attends over {tokens} positions while {seen}: channel attention, "
            "tokens dropped, or patches cut in a way that neither a convolution nor patch_size shows."
        )
    seen_by = _what_tokens_see(found, image, layouts[0])
    if seen_by is None and layouts[0].grid in told:
        return layouts[0]
    for layout in layouts:
        if seen_by is not None and sees_its_patches(layout, *seen_by):
            return layout
    tried = ", ".join(dict.fromkeys(f"{height} x {width}" for height, width in grids))
    raise UnsupportedModelError(
        f"the {tokens} tokens that {first.name} ({first.owner}) reads are not the image's patches in reading "
        f"order (tried {tried}): a token "
        "depends on another part of the image (permuted, cropped or regrouped patches), so no picture can be "
        "drawn."
    )


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
    """Up to two token indices and how strongly they depend on each pixel together, `(height, width)`."""
    first = found.calls[0]
    patches = first.k.shape[-2] - layout.prefix
    asked = sorted({layout.prefix + int(patches * 0.35), layout.prefix + int(patches * 0.8)})
    for candidate in found.trace.tokens.entering:
        tokens = as_tokens(candidate, len(first.k), first.k.shape[-2])
        if tokens is None:
            continue
        # Not a plain sum: the sum over a LayerNorm's output is constant.
        score = (tokens[:, asked] * direction(tokens)).sum()
        (grad,) = torch.autograd.grad(score, image, retain_graph=True, allow_unused=True)
        if grad is not None and grad.isfinite().all() and grad.any():
            seen = grad.to(torch.promote_types(grad.dtype, torch.float32)).square().sum((0, 1))
            return asked, seen / seen.sum()
    return None


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
