"""GMAR: gradient-driven multi-head attention rollout (arXiv 2504.19414)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, get_args

import torch
from torch import Tensor, nn

from gmar_lightning.explain.attention import AttentionCall, Recording, recording
from gmar_lightning.explain.companions import companion_signals
from gmar_lightning.explain.errors import UnsupportedModelError
from gmar_lightning.explain.importance import Norm, head_importance, head_weights
from gmar_lightning.explain.isolation import undisturbed
from gmar_lightning.explain.rollout import Rollout, roll_out, to_grid
from gmar_lightning.explain.tokens import TokenLayout, check_plain_attention, readout_rows, token_layout

__all__ = ["GMARResult", "check_form", "classifier_of", "forward", "gmar", "logits_of", "model_inputs"]


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
        batch = _batch_size(inputs)
        goals = None if targets is None else _checked_targets(targets, batch)
        step = micro_batch_size or batch
        parts = []
        for start in range(0, batch, step):
            rows = slice(start, start + step)
            part = {key: value[rows] if _is_batched(value, batch) else value for key, value in inputs.items()}
            parts.append(
                _explain(
                    classifier,
                    part,
                    None if goals is None else goals[rows],
                    norm=norm,
                    rollout=rollout,
                    residual=1.0 if residual is None else residual,
                    companions=companions,
                )
            )
    return _joined(parts)


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
    padding = inputs.get("attention_mask")
    with recording(classifier) as found:
        logits = logits_of(forward(classifier, inputs))
        batch = len(logits)
        check_plain_attention(found, batch)
        layout = token_layout(found, classifier, _image_size(inputs))
        goals = logits.argmax(-1) if targets is None else targets.to(logits.device)
        if goals.max() >= logits.shape[1]:
            raise ValueError(
                f"targets name class {int(goals.max())}, but the model has {logits.shape[1]} classes"
            )
        score = logits.gather(1, goals[:, None]).sum()
        grads, token_grad = _gradients(found, score)
    logits, names = logits.detach(), tuple(call.name for call in found.calls)
    start = _readout(classifier, inputs, found.calls, token_grad)
    del token_grad
    signals = [companion_signals(call, layout, padding) for call in found.calls] if companions else []
    scores = [
        head_importance(call, grad, norm, padding) for call, grad in zip(found.calls, grads, strict=True)
    ]
    weights = [head_weights(_even(score) if norm == "uniform" else score) for score in scores]
    steps = list(zip(found.calls, weights, grads, strict=True))
    if found.calls[-1].q.shape[-2] != found.calls[-1].k.shape[-2]:
        # The pool's own head-weighted row is where the rollout over the token layers starts.
        pool, pool_weights, _ = steps.pop()
        start = (pool_weights[:, :, None] * pool.attention()[:, :, 0]).sum(1)
    depths = [list(group) for _, group in itertools.groupby(steps, key=lambda step: step[0].depth)]
    row = roll_out(start.to(scores[0].dtype), depths, rollout, residual)
    return GMARResult(
        heatmaps=_folded(row, layout, padding),
        importance=_ragged(scores),
        head_weights=_ragged(weights),
        logits=_reduced(logits),
        targets=goals,
        layers=names,
        entropy=_ragged([signal.entropy for signal in signals]) if signals else None,
        distance=_ragged([signal.distance for signal in signals]) if signals else None,
        output_norm=_ragged([signal.output_norm for signal in signals]) if signals else None,
    )


def _gradients(found: Recording, score: Tensor) -> tuple[list[Tensor], Tensor | None]:
    """Gradients of the score at the attention outputs and at the last token tensor that the logits read."""
    if not score.requires_grad:
        raise UnsupportedModelError(
            "the logits carry no gradient back to the attention layers: the model's forward detaches its features "
            "or runs under torch.no_grad(). Freeze with requires_grad_(False) instead."
        )
    outputs, tokens = [call.output for call in found.calls], found.trace.tokens
    grads = torch.autograd.grad(score, [*outputs, *tokens], allow_unused=True)
    at_outputs = [
        torch.zeros_like(output) if grad is None else grad
        for output, grad in zip(outputs, grads, strict=False)
    ]
    at_tokens = [grad for grad in grads[len(outputs) :] if grad is not None]
    return at_outputs, at_tokens[-1] if at_tokens else None


def _readout(
    classifier: nn.Module, inputs: dict[str, Any], calls: list[AttentionCall], token_grad: Tensor | None
) -> Tensor:
    if calls[-1].q.shape[-2] != calls[-1].k.shape[-2]:
        return calls[-1].q.new_ones(calls[-1].q.shape[0], 1)
    if token_grad is None:
        raise UnsupportedModelError(
            f"after {calls[-1].name} no module returned (batch, tokens, channels), so the tokens that the "
            "classifier reads cannot be told apart."
        )
    if not token_grad.isfinite().all():
        return token_grad.new_full(token_grad.shape[:2], torch.nan)
    if token_grad.flatten(1).abs().amax(-1).eq(0).any():
        token_grad = _gradient_before_head(classifier, inputs)
    return readout_rows(token_grad)


def _gradient_before_head(classifier: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Gradient at the tokens of a fixed function of the classifier's input, for a head whose weights are 0."""
    with recording(classifier) as found:
        forward(classifier, inputs)
        pooled, tokens = found.trace.pooled, found.trace.tokens
        if pooled is not None and pooled.requires_grad and tokens:
            # Not a plain sum: the sum over a LayerNorm's output is constant.
            direction = torch.arange(pooled.shape[-1], device=pooled.device).cos().to(pooled.dtype)
            grads = torch.autograd.grad((pooled * direction).sum(), tokens, allow_unused=True)
            used = [grad for grad in grads if grad is not None]
            if used and used[-1].flatten(1).abs().amax(-1).gt(0).all():
                return used[-1]
    raise UnsupportedModelError(
        "the logits do not depend on the tokens at all (a head initialised to zero?), and no linear layer on "
        "pooled features was seen that would tell which tokens are read."
    )


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


def _even(scores: Tensor) -> Tensor:
    return torch.ones_like(scores)


def _reduced(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def classifier_of(model: nn.Module, module: str | None) -> nn.Module:
    """The submodule at a dotted path, or the model itself.

    Raises:
        ValueError: When there is no such submodule, with those there are.
    """
    if module is None:
        return model
    try:
        return model.get_submodule(module)
    except AttributeError:
        children = ", ".join(name for name, _ in model.named_children()) or "none"
        raise ValueError(
            f"module={module!r} is not a submodule of {type(model).__name__}; its children: {children}"
        ) from None


def model_inputs(classifier: nn.Module, images: Tensor | Mapping[str, Any]) -> dict[str, Any]:
    """The batch on the model's device and in its precision, safe to differentiate through.

    Returns:
        Keyword arguments; a plain image tensor sits under the empty name.
    """
    parameter = next((p for p in classifier.parameters() if p.is_floating_point()), None)
    inputs = dict(images) if isinstance(images, Mapping) else {"": images}
    return {key: _fitted(value, parameter) for key, value in inputs.items()}


def _fitted(value: Any, parameter: nn.Parameter | None) -> Any:
    if not isinstance(value, Tensor):
        return value
    # A tensor made under inference mode can never enter a graph; its clone can.
    value = value.clone() if value.is_inference() else value.detach()
    if parameter is None:
        return value
    low = torch.is_autocast_enabled(parameter.device.type)
    dtype = parameter.dtype if value.is_floating_point() and not low else value.dtype
    return value.to(device=parameter.device, dtype=dtype)


def forward(classifier: nn.Module, inputs: dict[str, Any]) -> Any:
    """Run the classifier on what `model_inputs` prepared."""
    return classifier(inputs[""]) if "" in inputs else classifier(**inputs)


def logits_of(output: Any) -> Tensor:
    """The `(batch, classes)` logits in what a model returned.

    Raises:
        UnsupportedModelError: Naming what was returned instead.
    """
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if isinstance(logits, Tensor) and logits.ndim == 2:
        return logits
    seen = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(output).__name__
    raise UnsupportedModelError(
        f"the forward pass returned {seen}; expected logits (batch, classes), as a tensor or in .logits. "
        "Name the classifier inside the model with module=."
    )


def _image_size(inputs: dict[str, Any]) -> tuple[int, int] | None:
    for value in inputs.values():
        if isinstance(value, Tensor) and value.ndim == 4:
            return value.shape[-2], value.shape[-1]
    return None


def _batch_size(inputs: dict[str, Any]) -> int:
    for key, value in inputs.items():
        if isinstance(value, Tensor) and value.ndim:
            if key == "" and value.ndim != 4:
                raise ValueError(f"images must be (batch, channels, height, width), got {tuple(value.shape)}")
            if len(value) == 0:
                raise ValueError("the batch is empty")
            return len(value)
    raise ValueError("no tensor among the inputs: pass images, or a mapping of the model's arguments")


def _is_batched(value: Any, batch: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == batch


def _checked_targets(targets: Any, batch: int) -> Tensor:
    goals = torch.as_tensor(targets)
    if goals.shape != (batch,) or goals.is_floating_point() or goals.dtype == torch.bool:
        raise ValueError(
            f"targets must be {batch} class indices, one per image; got {tuple(goals.shape)} of {goals.dtype}"
        )
    if goals.min() < 0:
        raise ValueError(f"targets must be class indices >= 0; got {int(goals.min())}")
    return goals.clone().long() if goals.is_inference() else goals.long()


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
