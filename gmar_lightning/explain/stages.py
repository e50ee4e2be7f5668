"""Models whose layers share no one set of tokens: heads of every layer, and the picture of the last stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gmar_lightning.explain.attention import AttentionCall, Recording
from gmar_lightning.explain.errors import NoPictureError
from gmar_lightning.explain.tokens import TokenLayout, direction, sees_its_patches


def last_stage(found: Recording, calls: Sequence[AttentionCall], batch: int) -> Recording:
    """The last run of layers that attend over one and the same set of tokens of the whole image.

    Raises:
        NoPictureError: When there is none.
    """
    last = calls[-1]
    body = list(calls[:-1] if last.is_pool and len(calls) > 1 else calls)
    tokens = last.k.shape[-2]
    run: list[AttentionCall] = [] if len(body) == len(calls) else [last]
    for call in reversed(body):
        square = call.q.shape[-2] == call.k.shape[-2] == tokens
        if not square or len(call.q) != batch or call.twin or call.shared_qkv:
            break
        run.insert(0, call)
    run = _without_mixing(run, found)
    if not any(not call.is_pool for call in run) or tokens < 2 or any(c.detached for c in run[1:]):
        raise NoPictureError(
            f"the last attention layer, {last.name} ({last.owner}), attends from {last.q.shape[-2]} queries to "
            f"{tokens} keys in {len(last.q) // batch} windows per image: no run of layers at the end shares one "
            "grid of the whole image."
        )
    return replace(found, calls=run)


def _without_mixing(run: list[AttentionCall], found: Recording) -> list[AttentionCall]:
    """The part of a run behind the last place at which something else mixed tokens."""
    mixed = len(found.trace.mixers)
    return [call for call in run if call.mixers_before == mixed]


def stage_layout(stage: Recording, image: Tensor | None) -> TokenLayout:
    """The grid of a stage's tokens, which must lie on the image in reading order.

    Raises:
        NoPictureError: When they do not, or there is no image.
    """
    first = stage.calls[0]
    tokens = first.k.shape[-2]
    if image is None or first.values is None or not first.values.requires_grad:
        raise NoPictureError("the stage's tokens cannot be followed back to an image.")
    height, width = image.shape[-2:]
    for rows in range(1, tokens + 1):
        # Grids have square cells up to rounding: as many rows per column as the image is high per width.
        if tokens % rows == 0 and abs(rows * width - tokens // rows * height) < max(height, width):
            layout = TokenLayout(0, (rows, tokens // rows))
            if _in_order(first, layout, image):
                return layout
    raise NoPictureError(
        f"the {tokens} tokens of {first.name} ({first.owner}) are not a grid of the image in reading order."
    )


def _in_order(call: AttentionCall, layout: TokenLayout, image: Tensor) -> bool:
    assert call.values is not None
    tokens = call.values.shape[-2]
    asked = sorted({int(tokens * 0.35), int(tokens * 0.8)})
    values = call.values[..., asked, :]
    (grad,) = torch.autograd.grad(
        (values * direction(values)).sum(), image, retain_graph=True, allow_unused=True
    )
    if grad is None or not grad.isfinite().all() or not grad.any():
        return False
    seen = grad.to(torch.promote_types(grad.dtype, torch.float32)).square().sum((0, 1))
    return sees_its_patches(layout, asked, seen / seen.sum())
