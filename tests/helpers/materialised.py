"""Importance per head by plain autograd on attention maps that the model's own arithmetic materialises.

Written for the tests alone; shares no code with the package. Fused calls are replaced by an explicit softmax; what a
model computes by hand is caught as its softmax returns, or as a named module (talking heads) returns it mixed.
"""

import dataclasses
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
import torch.nn.functional as F
from torch.nn.modules import module as module_hooks

from tests.helpers.reference import full_rollout, materialised


@contextmanager
def caught_softmaxes(maps):
    """Collect the result of every softmax with three axes or more, attached to the graph."""
    originals, last = (F.softmax, torch.softmax, torch.Tensor.softmax), [None]

    def catching(original):
        def softmax(*args, **kwargs):
            result = original(*args, **kwargs)
            if result.ndim >= 3 and result is not last[0]:  # F.softmax calls the method
                maps.append(result)
            last[0] = result
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


# Image by image, for models of any kind -------------------------------------------------------------------


# Modules that make a map of a softmax's result, and where they have the heads.
TALKING = {"proj_w": "heads last", "talking_head2": "", "mix_post": "", "reattn_norm": ""}
ONE_AFTER_THE_OTHER = {"CascadedGroupAttention"}  # a map per head


@dataclasses.dataclass
class Map:
    """One attention map of one image, `(windows, heads, queries, keys)`, and its gradient."""

    attention: torch.Tensor
    grad: torch.Tensor
    convolutions: int  # with a kernel larger than one that ran before it

    @property
    def is_global(self):
        return len(self.attention) == 1 and self.attention.shape[-2] == self.attention.shape[-1]


def maps_of_one(model, image, target):
    """Every map through which the logit of one image passes; nothing but the number of heads is looked up.

    All axes in front of a map are heads and windows, and the module that runs says how many heads there are. The
    image is in the batch twice, and the second half of everything is dropped: `F.batch_norm` in evaluation has
    wrong gradients for a batch of one whose gradient comes channels last (torch 2.14, CPU).
    """
    image = torch.cat([image, image])
    caught, running, kernels = [], [], []

    def enter(module, args):
        running.append(module)

    def leave(module, args, output):
        running.pop()
        for name, order in TALKING.items():  # heads are mixed behind the softmax
            if running and getattr(running[-1], name, None) is module:
                caught[-1] = (output, caught[-1][1], order, len(kernels))

    def note(result):
        caught.append((result, _head_count(running), "", len(kernels)))

    def convolve(x, weight, *args, **kwargs):
        kernels.extend([None] * (max(weight.shape[2:]) > 1))
        return convolution(x, weight, *args, **kwargs)

    convolution, maps = F.conv2d, _Noting(note)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(F, "conv2d", convolve))
        for handle in (
            module_hooks.register_module_forward_pre_hook(enter),
            module_hooks.register_module_forward_hook(leave, always_call=True),
        ):
            stack.callback(handle.remove)
        # The explicit softmax that stands in for the fused kernel is caught like those of the model.
        stack.enter_context(materialised([]))
        stack.enter_context(caught_softmaxes(maps))
        output = model(image)
    logits = getattr(output, "logits", output)
    grads = torch.autograd.grad(logits[0, target], [entry[0] for entry in caught], allow_unused=True)
    return [
        Map(_heads_second(entry[0].detach(), *entry[1:3]), _heads_second(grad, *entry[1:3]), entry[3])
        for entry, grad in zip(caught, grads, strict=True)
        if grad is not None
    ]


class _Noting(list):
    def __init__(self, note):
        super().__init__()
        self.append = note


def _head_count(running):
    for module in reversed(running):
        if type(module).__name__ in ONE_AFTER_THE_OTHER:
            return 1
        for name in ("num_heads", "n_heads", "heads", "num_attention_heads"):
            if isinstance(getattr(module, name, None), int):
                return getattr(module, name)
    return None


def _heads_second(value, heads, order):
    assert len(value) % 2 == 0
    value = value[: len(value) // 2]
    if order == "heads last":
        return value.permute(0, 3, 1, 2)
    if value.ndim == 3:
        return value.unflatten(0, (-1, heads or 1))
    if value.ndim == 5:  # (1, heads, windows, ...) or (1, windows, heads, ...)
        value = value[0].transpose(0, 1) if value.shape[1] == heads else value[0]
    elif value.shape[1] != heads and len(value) == heads:  # (heads, windows, ...)
        value = value.transpose(0, 1)
    assert heads in (None, value.shape[1]), f"{tuple(value.shape)} for {heads} heads"
    return value


def heads_alone(maps):
    """L1 importance and contribution of each map of an image, `(heads,)` each; windows add up."""
    return [(m.grad.abs().sum((0, 2, 3)), (m.attention * m.grad).sum((0, 2, 3))) for m in maps]


def stage_row(maps, rollout, parallel=1, read=None):
    """The row of the last stage, all of whose tokens the classifier averages, `(tokens,)`.

    The stage is the last run of maps over one set of all tokens, without a convolution between them;
    `parallel` maps sit at one depth. With `read`, the row `(tokens,)` that the classifier reads instead of the mean.
    """
    last, stage = maps[-1], []
    for one in reversed(maps):
        same = one.is_global and one.attention.shape[-1] == last.attention.shape[-1]
        if not same or one.convolutions != last.convolutions:
            break
        stage.insert(0, one)
    weighted = []
    for one in stage:
        importance = one.grad.abs().sum((-2, -1))
        weights = (importance / importance.sum(-1, keepdim=True))[:, :, None, None]
        gated = (one.attention * one.grad).clamp(min=0)
        weighted.append((weights * (gated if rollout == "gradient" else one.attention)).sum(1))
    depths = [sum(weighted[i : i + parallel]) / parallel for i in range(0, len(weighted), parallel)]
    product = full_rollout(depths, rollout, 1.0)[0]
    return product.mean(0) if read is None else read.to(product) @ product
