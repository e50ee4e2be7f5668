"""Which axis of an attention call is what: images, windows and heads told apart, by gradient.

Attention in windows, along axes or with heads merged into the batch comes in many layouts. Each call is brought to
`(images * windows, heads, queries, dim)`; what a value was computed from settles which axis is which. A head sees the
same part of the module's input as the head beside it, a window another one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gmar_lightning.explain.attention import AttentionCall
from gmar_lightning.explain.errors import UnsupportedModelError
from gmar_lightning.explain.importance import Norm, equal_weights, head_weights
from gmar_lightning.explain.sweep import LayerNumbers

Support = tuple[Tensor | None, ...]


def folded(calls: Sequence[AttentionCall], batch: int, image: Tensor | None) -> list[AttentionCall]:
    """The calls as `(images * windows, heads, queries, dim)`, images first.

    Args:
        calls: Recorded calls of any layout.
        batch: Number of images.
        image: The images at the head of the graph.

    Raises:
        UnsupportedModelError: For a call whose axes cannot be told apart.
    """
    arranged = [_arranged(call, batch) for call in calls]
    _check_images(arranged, batch, image)
    return arranged


def check_over_tokens(calls: Sequence[AttentionCall]) -> None:
    """Refuse attention over channels, asked once of each class of attention module.

    Raises:
        UnsupportedModelError: Naming the module.
    """
    checked: set[str] = set()
    for call in calls:
        if call.shared_qkv:
            raise UnsupportedModelError(
                f"{call.name} ({call.owner}) pools without parameters: queries, keys and values are one tensor."
            )
        if call.owner not in checked:
            checked.add(call.owner)
            _check_over_tokens(call)


def fold_numbers(numbers: LayerNumbers, batch: int, norm: Norm) -> LayerNumbers:
    """Numbers of `(images * windows, heads)` as those of images.

    The map of an image is the block-diagonal matrix of its windows: norms and contributions add up, means are means
    over windows, the largest logit is the largest of any. A token's index within a window says nothing.

    Args:
        numbers: Of one layer, a row per window.
        batch: Number of images.
        norm: As for `gmar`.
    """

    def of_images(value: Tensor) -> Tensor:
        return value.unflatten(0, (batch, -1))

    if len(numbers.importance) == batch:
        return numbers
    importance = of_images(numbers.importance)
    importance = importance.square().sum(1).sqrt() if norm == "l2" else importance.sum(1)
    signals = {name: _folded_signal(name, of_images(value)) for name, value in numbers.signals.items()}
    weights = equal_weights(importance) if norm == "uniform" else head_weights(importance)
    return LayerNumbers(importance, weights, of_images(numbers.contribution).sum(1), {}, signals)


def _folded_signal(name: str, value: Tensor) -> Tensor:
    if name in ("output_norm", "gradient_norm"):
        return value.square().sum(1).sqrt()
    if name == "logit_max":
        return value.amax(1)
    return torch.full_like(value[:, 0], torch.nan) if name == "sink_token" else value.nanmean(1)


def is_plain(call: AttentionCall, batch: int) -> bool:
    """Whether a call is `(batch, heads, tokens, dim)` as it stands."""
    return call.q.ndim == 4 and len(call.q) == batch


def _arranged(call: AttentionCall, batch: int) -> AttentionCall:
    lead = tuple(call.q.shape[:-2])
    if not lead or lead[0] % batch or len(lead) > 3:
        raise UnsupportedModelError(
            f"{call.name} ({call.owner}) attends with queries of shape {tuple(call.q.shape)} for {batch} images: "
            "which axis holds the images is not clear."
        )
    if len(lead) == 1:
        view, heads_first = _merged(call, batch)
        return replace(_reshaped(call, view), heads_first=heads_first)
    windows = [axis for axis in range(1, len(lead)) if lead[axis] > 1 and not _same_input(call, axis)]
    heads = [axis for axis in range(1, len(lead)) if axis not in windows]
    if len(lead) == 3 and len(heads) == 2:
        # One of them is 1 long, or nothing tells them apart.
        heads = [axis for axis in heads if lead[axis] > 1][:1] or heads[:1]
        windows = [axis for axis in (1, 2) if axis not in heads]
        if any(lead[axis] > 1 for axis in windows):
            raise UnsupportedModelError(
                f"{call.name} ({call.owner}) attends with queries of shape {tuple(call.q.shape)}: heads and windows "
                "cannot be told apart."
            )
    order = [0, *windows, *heads]
    count = 1
    for axis in heads:
        count *= lead[axis]
    if count == 1 and (run := _heads_in_front(call, len(call.q) // batch)) > 1:
        # (images * heads, windows): the heads go behind the windows.
        apart = [0, *range(2, len(lead) + 1), 1]
        return _reshaped(
            call,
            lambda x: x.unflatten(0, (-1, run)).permute(*apart, -2, -1).reshape(-1, run, *x.shape[-2:]),
        )
    if order == [0, 1] and len(lead) == 2 and heads:
        return call
    return _reshaped(call, lambda x: x.permute(*order, -2, -1).reshape(-1, count, *x.shape[-2:]))


def _merged(call: AttentionCall, batch: int) -> tuple[Callable[[Tensor], Tensor], bool]:
    """How a call with one axis in front is taken apart, and whether heads are in front of the images there."""
    rows = call.q.shape[0]
    sizes = [x.shape[axis] for x in call.entering for axis in (0, 1) if x.ndim > axis]
    outer = next((size for size in sizes if size % batch == 0 and rows % size == 0), batch)
    inner = rows // outer
    if inner == 1:
        return (lambda x: x[:, None]), False
    first, run = _support(call, (0, 0)), _heads_in_front(call, inner)
    if run == 1 and _equal(first, _support(call, (outer, 0))):
        return (lambda x: x.unflatten(0, (inner, outer)).transpose(0, 1)), True
    return (lambda x: x.unflatten(0, (-1, run))), False


def _heads_in_front(call: AttentionCall, inner: int) -> int:
    """How many neighbours on the first axis, `inner` to an image, were computed from the same input: heads."""
    rest = [0] * (call.q.ndim - 2)
    first, run = _support(call, (0, *rest)), 1
    while run < inner and _equal(first, _support(call, (run, *rest))):
        run += 1
    while inner % run:
        run -= 1
    return run


def _reshaped(call: AttentionCall, view: Callable[[Tensor], Tensor]) -> AttentionCall:
    lead = call.q.shape[:-2]

    def shaped(part: Tensor) -> Tensor:
        if (
            part.ndim > 2
            and part.shape[:-2] != lead
            and part.ndim == len(lead) + 2
            and part.shape[-3] != lead[-1]
        ):
            part = part.repeat_interleave(lead[-1] // part.shape[-3], -3)  # grouped keys
        return view(part.expand(*lead, *part.shape[-2:]))

    return replace(
        call,
        q=shaped(call.q),
        k=shaped(call.k),
        v=shaped(call.v),
        mask=None if call.mask is None else shaped(_at_least_2d(call.mask)),
        weights=None if call.weights is None else shaped(call.weights),
        output=shaped(call.output),
        values=None if call.values is None else shaped(call.values),
        arrange=lambda x: shaped(call.arrange(x)),
    )


def _at_least_2d(mask: Tensor) -> Tensor:
    return mask if mask.ndim > 1 else mask[None]


def _same_input(call: AttentionCall, axis: int) -> bool:
    """Whether two places along an axis in front were computed from the same part of the module's input."""
    place = [0] * (call.q.ndim - 1)
    first = _support(call, tuple(place))
    # Grouped keys are shared by neighbours: the last entry is another group.
    place[axis] = (call.v if call.values is None else call.values).shape[axis] - 1
    return _equal(first, _support(call, tuple(place)))


def _support(call: AttentionCall, place: tuple[int, ...], dim: int | None = None) -> Support:
    """Which elements of the module's inputs the value at a place depends on."""
    values = call.values
    if values is None or not values.requires_grad or not call.entering:
        return ()
    value = values[place] if dim is None else values[place][dim : dim + 1]
    # Not a plain sum: the sum over a LayerNorm's output is constant.
    weights = torch.arange(1, len(value) + 1, device=value.device).cos().to(value.dtype)
    grads = torch.autograd.grad(
        (value * weights).sum(), list(call.entering), retain_graph=True, allow_unused=True
    )
    return tuple(None if grad is None else grad != 0 for grad in grads)


def _equal(one: Support, other: Support, axis: int | None = None) -> bool:
    for first, second in zip(one, other, strict=True):
        if (first is None) != (second is None):
            return False
        if first is None or second is None or (axis is not None and first.ndim <= axis + 1):
            continue
        first, second = (x if axis is None else x.any(axis) for x in (first, second))
        if not torch.equal(first, second):
            return False
    return True


def _check_over_tokens(call: AttentionCall) -> None:
    """Refuse attention over channels: another channel of a value is another place of the image."""
    if call.values is None or call.values.shape[-2] == 1 or call.values.shape[-1] == 1:
        return
    place, far = (0, 0, 0), (0, 0, call.values.shape[-2] - 1)
    here, other_key = _support(call, place, 0), _support(call, far, 0)
    other_dim = _support(call, place, call.values.shape[-1] - 1)
    # Channels are the last axis of tokens, the second of a picture; reduced over them, places are left.
    for axis in (None, -1, 1):
        if _equal(here, other_key, axis) and not _equal(here, other_dim, axis):
            raise UnsupportedModelError(
                f"{call.name} ({call.owner}) attends over channels, not tokens: another channel of its values comes "
                "from another place of the image (cross-covariance or channel attention)."
            )


def _check_images(calls: Sequence[AttentionCall], batch: int, image: Tensor | None) -> None:
    """Refuse windows that are not sorted by image: the rows of the first image must depend on it alone."""
    split = [call for call in calls if len(call.q) != batch and call.values is not None]
    if batch == 1 or image is None or not split:
        return
    score: Any = sum(
        (values[: len(values) // batch] * values.detach()[: len(values) // batch]).sum()
        for values in (call.values for call in split)
        if values is not None and values.requires_grad
    )
    if not isinstance(score, Tensor):
        return
    (grad,) = torch.autograd.grad(score, image, retain_graph=True, allow_unused=True)
    if grad is not None and (grad[1:] != 0).any():
        raise UnsupportedModelError(
            f"{split[0].name} ({split[0].owner}) attends with {len(split[0].q)} rows for {batch} images that are not "
            "sorted by image (windows in front of images, or images that look at one another). "
            "Explain one image at a time with micro_batch_size=1."
        )
