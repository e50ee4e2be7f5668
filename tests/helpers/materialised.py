"""Importance per head by plain autograd on attention maps that the model's own arithmetic materialises.

Written for the tests alone; shares no code with the package. Fused calls are replaced by an explicit softmax; what a
model computes by hand is caught as its softmax returns, or as a named module (talking heads) returns it mixed.
"""

from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
import torch.nn.functional as F

from tests.helpers.reference import materialised


@contextmanager
def caught_softmaxes(maps):
    """Collect the result of every softmax with three axes or more, attached to the graph."""
    originals = F.softmax, torch.softmax, torch.Tensor.softmax

    def catching(original):
        def softmax(*args, **kwargs):
            result = original(*args, **kwargs)
            if result.ndim >= 3:
                maps.append(result)
            return result

        return softmax

    with ExitStack() as stack:
        for owner, name, original in zip((F, torch, torch.Tensor), ["softmax"] * 3, originals, strict=True):
            stack.enter_context(mock.patch.object(owner, name, catching(original)))
        yield


def map_gradients(model, images, score, *, by_hand=False, mixed=()):
    """`(map, gradient)` of every attention map of a pass.

    Args:
        score: `(output) -> (batch,)`.
        by_hand: Catch the model's own softmaxes instead of its fused calls.
        mixed: Modules whose output, heads last, is the map that multiplies the values.
    """
    maps, handles = [], []
    for module in mixed:
        handles.append(module.register_forward_hook(lambda m, a, out: maps.append(out)))
    with ExitStack() as stack:
        if by_hand and not mixed:
            stack.enter_context(caught_softmaxes(maps))
        elif not by_hand:
            stack.enter_context(materialised(maps))
        output = model(**images) if isinstance(images, dict) else model(images)
    grads = torch.autograd.grad(score(output).sum(), maps, allow_unused=True)
    for handle in handles:
        handle.remove()
    return [(a.detach(), torch.zeros_like(a) if g is None else g) for a, g in zip(maps, grads, strict=True)]


def per_head(pairs, batch, layout):
    """L1 importance and contribution per image and head, one `(batch, heads)` pair per layer.

    Args:
        layout: Of a map's leading axes, one letter each: b image (with windows behind it), h heads, w windows; "bh"
            for merged axes is written "m" with the number of heads, as in "m3".
    """
    for attention, grad in pairs:
        yield tuple(_per_head(x.sum((-2, -1)), batch, layout) for x in (grad.abs(), attention * grad))


def _per_head(value, batch, layout):
    if layout.startswith("m"):
        return value.view(batch, -1, int(layout[1:])).sum(1)
    if layout == "b":
        return value.view(batch, -1).sum(1, keepdim=True)
    axes = {"bh": value, "bwh": value.transpose(1, 2) if value.ndim == 3 else value, "bhw": value}[layout]
    if axes.ndim == 3:
        axes = axes.sum(2)
    return axes.view(batch, -1, axes.shape[1]).sum(1)
