"""GMAR: gradient-driven multi-head attention rollout (arXiv 2504.19414)."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, get_args

import torch
from torch import Tensor, nn

from gmar_lightning.explain.attention import AttentionCall, Recording, recording
from gmar_lightning.explain.importance import Norm, companion_signals, head_importance, head_weights
from gmar_lightning.explain.inputs import (
    batch_size,
    checked_targets,
    classifier_of,
    forward,
    image_key,
    logits_of,
    micro_batches,
    model_inputs,
    padding_of,
)
from gmar_lightning.explain.isolation import undisturbed
from gmar_lightning.explain.mixing import check_apart
from gmar_lightning.explain.readout import check_rows_apart, readout
from gmar_lightning.explain.refusals import check_plain_attention, check_reached
from gmar_lightning.explain.rollout import Rollout, roll_out, start_row, to_grid
from gmar_lightning.explain.tokens import TokenLayout, token_layout


@dataclass(frozen=True, eq=False)
class GMARResult:
    """An explanation of a batch; every tensor is detached, float32, on the model's device.

    (For a float64 model the tensors are float64.)

    Attributes:
        heatmaps: `(batch, grid_h, grid_w)`, non-negative, one map per image, not scaled. `(batch, tokens)`
            for a model that reads token sequences.
        importance: `(batch, layers, heads)`, norm of the gradient of the logit with respect to each attention
            map. NaN where a layer has fewer heads than the widest one.
        head_weights: `(batch, layers, heads)`, importance as a share of its layer.
        logits: `(batch, classes)`, of the explained forward pass.
        targets: `(batch,)`, the classes explained.
        layers: Module path of each attention layer, in forward order; a final attention pool is one of them.
        entropy: `(batch, layers, heads)`, normalised attention entropy; None unless companions were asked for.
        distance: `(batch, layers, heads)`, mean attention distance in patches; likewise.
        output_norm: `(batch, layers, heads)`, norm of each head's output; likewise.
    """

    heatmaps: Tensor
    importance: Tensor
    head_weights: Tensor
    logits: Tensor
    targets: Tensor
    layers: tuple[str, ...]
    entropy: Tensor | None = None
    distance: Tensor | None = None
    output_norm: Tensor | None = None


def gmar(
    model: nn.Module,
    images: Tensor | Mapping[str, Any],
    targets: Tensor | None = None,
    *,
    norm: Norm = "l1",
    rollout: Rollout = "paper",
    residual: float | None = None,
    micro_batch_size: int | None = None,
    module: str | None = None,
    companions: bool = False,
) -> GMARResult:
    """Explain a batch: one heatmap per image, one importance per attention head.

    The model may be in any mode, on any device, compiled or not, frozen or not, with or without gradient
    checkpointing; the call may sit under `no_grad` or `inference_mode`. Nothing about the model changes.
    Cost: one forward and one backward over activations, a little more than two forwards.

    Args:
        model: Takes images `(batch, channels, height, width)` and returns logits `(batch, classes)`, as a
            tensor or as an object with `.logits`.
        images: The batch; or a mapping of keyword arguments (`{"pixel_values": ...}`, or `input_ids` and
            `attention_mask` of a text encoder, whose relevance is then per token with padding at zero).
        targets: `(batch,)` class indices; None explains the predicted class.
        norm: How a head's gradient becomes its score: "l1", "l2", or "uniform" (plain attention rollout:
            heads weigh the same; importance is still the L1 norm).
        rollout: "paper", "flow", "gradient" or "last_layer", see `roll_out`.
        residual: Weight of the residual path, 1 when None.
        micro_batch_size: Images per forward; bounds memory, does not change the result.
        module: Dotted path of the classifier inside `model`, when `model` itself is something else.
        companions: Also compute entropy, attention distance and output norm per head.

    Returns:
        The explanation. Row i of a batch equals image i alone.

    Raises:
        UnsupportedModelError: When the picture cannot be derived; says what was seen.
        ValueError: For arguments that do not fit.
    """
    check_form(norm, rollout, residual, micro_batch_size)
    classifier = classifier_of(model, module)
    with undisturbed(classifier):
        inputs = model_inputs(classifier, images)
        batch = batch_size(inputs)
        goals = None if targets is None else checked_targets(targets, batch)
        explain = functools.partial(
            _explain,
            classifier,
            norm=norm,
            rollout=rollout,
            residual=1.0 if residual is None else residual,
            companions=companions,
        )
        return _joined([explain(*part) for part in micro_batches(inputs, goals, micro_batch_size or batch)])


@dataclass(frozen=True, eq=False)
class _Measured:
    """What one forward and one backward showed of a batch; `start` is the readout row `(batch, tokens)`."""

    calls: list[AttentionCall]
    grads: list[Tensor]
    start: Tensor
    layout: TokenLayout
    padding: Tensor | None
    logits: Tensor
    targets: Tensor


def _explain(
    classifier: nn.Module,
    inputs: dict[str, Any],
    targets: Tensor | None,
    *,
    norm: Norm,
    rollout: Rollout,
    residual: float,
    companions: bool,
) -> GMARResult:
    form: Any = {"norm": norm, "rollout": rollout, "residual": residual, "companions": companions}
    seen = _measure(classifier, inputs, targets)
    if seen is None:
        halves = micro_batches(inputs, targets, -(-batch_size(inputs) // 2))
        return _joined([_explain(classifier, *half, **form) for half in halves])
    calls, layout, padding = seen.calls, seen.layout, seen.padding
    signals = [companion_signals(call, layout, padding) for call in calls] if companions else []
    scores = [head_importance(*pair, norm, padding) for pair in zip(calls, seen.grads, strict=True)]
    weights = [
        head_weights(torch.ones_like(score) if norm == "uniform" else score).masked_fill(
            score.isnan(), torch.nan
        )
        for score in scores
    ]
    steps, start = list(zip(calls, weights, seen.grads, strict=True)), seen.start
    if calls[-1].is_pool:
        pool, pool_weights, _ = steps.pop()
        start = start_row(start, pool, pool_weights)
    depths = [list(group) for _, group in itertools.groupby(steps, key=lambda step: step[0].depth)]
    row = roll_out(start.to(scores[0].dtype), depths, rollout, residual)
    return GMARResult(
        heatmaps=_folded(row, layout, padding),
        importance=_ragged(scores),
        head_weights=_ragged(weights),
        logits=seen.logits if seen.logits.dtype == torch.float64 else seen.logits.float(),
        targets=seen.targets,
        layers=tuple(call.name for call in calls),
        entropy=_ragged([signal.entropy for signal in signals]) if signals else None,
        distance=_ragged([signal.distance for signal in signals]) if signals else None,
        output_norm=_ragged([signal.output_norm for signal in signals]) if signals else None,
    )


def _measure(classifier: nn.Module, inputs: dict[str, Any], targets: Tensor | None) -> _Measured | None:
    """Forward and backward; None when the batch is as long as the token axis and the two look alike."""
    with recording(classifier) as found:
        batch = found.batch = batch_size(inputs)
        logits, image = _forward(classifier, inputs, found)
        found.forget_unread_pool(logits)
        check_plain_attention(found, batch)
        tokens = found.calls[0].k.shape[-2]
        if batch == tokens > 1:
            return None
        padding = padding_of(inputs, tokens)
        layout = token_layout(found, classifier, image)
        goals = logits.argmax(-1) if targets is None else targets.to(logits.device)
        if goals.max() >= logits.shape[1]:
            raise ValueError(
                f"targets name class {int(goals.max())}, but the model has {logits.shape[1]} classes"
            )
        score = logits.gather(1, goals[:, None]).sum()
        start = readout(found, score, image)
        edges: Any = [call.edge for call in found.calls]
        grads = check_reached(found.calls, torch.autograd.grad(score, edges, allow_unused=True))
    if not found.calls[-1].is_pool:
        check_rows_apart(*_last_depth(found.calls, grads), start)
    check_apart(classifier, inputs, found, start, padding)
    return _Measured(found.calls, grads, start, layout, padding, logits.detach(), goals)


def _forward(classifier: nn.Module, inputs: dict[str, Any], found: Recording) -> tuple[Tensor, Tensor | None]:
    """Logits, and the images at the head of their graph."""
    key = image_key(inputs)
    if key is None or not inputs[key].is_floating_point():
        return logits_of(forward(classifier, inputs)), None if key is None else inputs[key]
    # The copy is no leaf, so that a model may normalise its input in place, and never the caller's.
    image = inputs[key].detach().requires_grad_().clone()
    found.image = image.grad_fn
    return logits_of(forward(classifier, {**inputs, key: image})), image


def _last_depth(calls: list[AttentionCall], grads: list[Tensor]) -> tuple[list[AttentionCall], list[Tensor]]:
    count = sum(call.depth == calls[-1].depth for call in calls)
    return calls[-count:], grads[-count:]


def _folded(row: Tensor, layout: TokenLayout, padding: Tensor | None) -> Tensor:
    if layout.grid is not None:
        return to_grid(row, layout.prefix, layout.grid)
    return row if padding is None else row * padding.to(row.dtype)


def _joined(parts: list[GMARResult]) -> GMARResult:
    if len(parts) == 1:
        return parts[0]
    joined = {}
    for item in fields(GMARResult):
        values = [getattr(part, item.name) for part in parts]
        joined[item.name] = torch.cat(values) if isinstance(values[0], Tensor) else values[0]
    return GMARResult(**joined)


def _ragged(per_layer: list[Tensor]) -> Tensor:
    """Stack `(batch, heads)` of every layer, padded with NaN to the widest layer."""
    widest = max(layer.shape[1] for layer in per_layer)
    padded = [nn.functional.pad(layer, (0, widest - layer.shape[1]), value=torch.nan) for layer in per_layer]
    return torch.stack(padded, 1)


def check_form(norm: str, rollout: str, residual: float | None, micro_batch_size: int | None) -> None:
    """Check the arguments that choose the form of the explanation.

    Raises:
        ValueError: With the allowed values.
    """
    for name, value, allowed in (("norm", norm, get_args(Norm)), ("rollout", rollout, get_args(Rollout))):
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, allowed))}")
    if residual is not None and not residual >= 0:
        raise ValueError(f"residual must be >= 0, got {residual}")
    if micro_batch_size is not None and micro_batch_size < 1:
        raise ValueError(f"micro_batch_size must be >= 1, got {micro_batch_size}")
