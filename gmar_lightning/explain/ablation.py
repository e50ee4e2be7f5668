"""What a head still contributes: the forward pass again, with its output replaced as it is computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gmar_lightning.explain.errors import UnsupportedModelError
from gmar_lightning.explain.inputs import batch_size, classifier_of, forward, logits_of, model_inputs
from gmar_lightning.explain.intercept import CallArguments, intercept_attention
from gmar_lightning.explain.isolation import undisturbed
from gmar_lightning.explain.output import kind_of, loss_of, predicted, score_of

Head = tuple[int, int]  # layer, head


@dataclass(frozen=True, eq=False)
class HeadAblation:
    """Effect of removing heads, per image.

    Attributes:
        logit_change: `(batch,)`, explained logit without the heads minus with them.
        loss_change: `(batch,)`, cross entropy of the target without the heads minus with them.
        targets: `(batch,)`, the classes explained.
        predictions: `(batch,)`, the predicted classes without the heads.
    """

    logit_change: Tensor
    loss_change: Tensor
    targets: Tensor
    predictions: Tensor


def ablate_heads(
    model: nn.Module,
    images: Tensor | Mapping[str, Any],
    targets: Tensor | None = None,
    *,
    heads: Sequence[Head],
    module: str | None = None,
    logits: Tensor | None = None,
    method: Literal["zero", "mean"] = "zero",
    means: Mapping[Head, Tensor] | None = None,
) -> HeadAblation:
    """Take away the output of some attention heads and measure what changes.

    Zeroing exaggerates: it also takes away what a head adds to every image alike, which the layers after it
    are used to (arXiv 2604.14433). `method="mean"` leaves that in place and takes away only what tells
    images apart. Cost: one forward, one more unless `logits` of the intact model are handed in, and one
    more for the mean unless `means` are. Nothing about the model changes.

    Args:
        model: As for `gmar`.
        images: As for `gmar`.
        targets: `(batch,)` class indices; None takes the class the intact model predicts.
        heads: `(layer, head)` pairs, layers counted in forward order as in `GMARResult.layers`.
        module: Dotted path of the classifier inside `model`.
        logits: `(batch, classes)` of the intact model, if they are known.
        method: What takes the place of a head's output: zeros, or its mean over `images`.
        means: That mean for each head, `(tokens, value_dim)`, where it is to be over other images.

    Returns:
        The changes.

    Raises:
        ValueError: When a layer or head does not exist, or the method is unknown.
    """
    if method not in ("zero", "mean"):
        raise ValueError(f'method={method!r} is unknown; choose "zero" or "mean"')
    classifier = classifier_of(model, module)
    if method == "mean" and means is None:
        means = {
            at: one.mean(0) for at, one in head_outputs(model, images, heads=heads, module=module).items()
        }
    with undisturbed(classifier), torch.no_grad():
        inputs = model_inputs(classifier, images)
        intact = logits_of(forward(classifier, inputs)) if logits is None else logits
        without = _logits_without(classifier, inputs, heads, means if method == "mean" else None)
    intact, without = intact.float(), without.float()
    kind = kind_of(intact)
    goals = predicted(intact, kind) if targets is None else torch.as_tensor(targets, device=intact.device)
    return HeadAblation(
        logit_change=score_of(without, goals, kind) - score_of(intact, goals, kind),
        loss_change=loss_of(without, goals, kind) - loss_of(intact, goals, kind),
        targets=goals,
        predictions=predicted(without, kind),
    )


def head_outputs(
    model: nn.Module,
    images: Tensor | Mapping[str, Any],
    *,
    heads: Sequence[Head],
    module: str | None = None,
) -> dict[Head, Tensor]:
    """What some heads return in the intact model, `(batch, tokens, value_dim)` each.

    Args:
        model: As for `gmar`.
        images: As for `gmar`.
        heads: `(layer, head)` pairs.
        module: Dotted path of the classifier inside `model`.

    Raises:
        ValueError: When a layer or head does not exist.
        UnsupportedModelError: When the layer attends within windows that share the batch axis.
    """
    classifier = classifier_of(model, module)
    kept: dict[Head, Tensor] = {}
    inputs = model_inputs(classifier, images)

    def keep(output: Tensor, layer: int, of_layer: Sequence[int]) -> Tensor:
        _check_image_rows(output, batch_size(inputs), layer)
        kept.update({(layer, head): output[:, head].clone() for head in of_layer})
        return output

    with undisturbed(classifier), torch.no_grad():
        _forward_changing(classifier, inputs, heads, keep)
    return kept


def gate_effects(
    model: nn.Module,
    images: Tensor | Mapping[str, Any],
    targets: Tensor,
    *,
    heads: Sequence[Head],
    module: str | None = None,
    steps: int = 4,
) -> Tensor:
    """Each head's own part of what zeroing the heads together does to the logit.

    Integrated gradients (arXiv 1703.01365) at a gate on each head's output, from 1 to 0 by the midpoint
    rule: the parts sum to the change of the logit, up to the error of so few steps.

    Args:
        model: As for `gmar`.
        images: As for `gmar`.
        targets: `(batch,)` class indices.
        heads: `(layer, head)` pairs, each once.
        module: Dotted path of the classifier inside `model`.
        steps: Points at which the gradient is taken; a forward and a backward each.

    Returns:
        `(batch, len(heads))`, logit without minus logit with the head.

    Raises:
        ValueError: When a layer or head does not exist.
        UnsupportedModelError: When the layer attends within windows that share the batch axis.
    """
    classifier = classifier_of(model, module)
    total = torch.zeros(len(targets), len(heads))
    for step in range(steps):
        gates: dict[Head, Tensor] = {}
        change = _through_gates(gates, (step + 0.5) / steps, len(targets))
        with undisturbed(classifier), torch.enable_grad():
            logits = _forward_changing(classifier, model_inputs(classifier, images), heads, change)
            score = score_of(logits, targets).sum()
            grads = torch.autograd.grad(score, [gates[at] for at in heads])
        total -= torch.stack([grad.float().cpu() for grad in grads], 1) / steps
    return total


def _through_gates(
    gates: dict[Head, Tensor], level: float, batch: int
) -> Callable[[Tensor, int, Sequence[int]], Tensor]:
    """Multiply the output of heads by gates of one level, one for each image, which are kept in `gates`."""

    def gated(output: Tensor, layer: int, of_layer: Sequence[int]) -> Tensor:
        _check_image_rows(output, batch, layer)
        factors = list(output.new_ones(len(output), output.shape[1]).unbind(1))
        for head in of_layer:
            gates[layer, head] = factors[head] = output.new_full((len(output),), level).requires_grad_()
        return output * torch.stack(factors, 1)[:, :, None, None]

    return gated


def _check_image_rows(output: Tensor, batch: int, layer: int) -> None:
    # Windows are often merged into the batch axis, image first or window first: not to be guessed.
    if len(output) != batch:
        raise UnsupportedModelError(
            f"layer {layer} attends within {len(output)} windows of {batch} images: which belong to which image is "
            "not known here, so a head has no mean over images."
        )


def _logits_without(
    classifier: nn.Module,
    inputs: dict[str, Any],
    heads: Sequence[Head],
    means: Mapping[Head, Tensor] | None,
) -> Tensor:
    def replace(output: Tensor, layer: int, of_layer: Sequence[int]) -> Tensor:
        for head in of_layer:
            output[:, head] = 0 if means is None else means[layer, head].to(output)
        return output

    return _forward_changing(classifier, inputs, heads, replace)


def _forward_changing(
    classifier: nn.Module,
    inputs: dict[str, Any],
    heads: Sequence[Head],
    change: Callable[[Tensor, int, Sequence[int]], Tensor],
) -> Tensor:
    """Logits of a forward in which `change(output, layer, heads)` stands for the output of those layers."""
    changed: dict[int, list[int]] = {}
    for layer, head in heads:
        changed.setdefault(layer, []).append(head)
    seen: list[int] = []

    def call_changed(call: CallArguments) -> Tensor:
        layer = len(seen)
        seen.append(call.q.shape[1])
        output = call.compute()
        of_layer = changed.get(layer, ())
        if of_layer and output.ndim != 4:
            raise UnsupportedModelError(
                f"{call.name} ({call.owner}) keeps its heads merged with other axes, {tuple(output.shape)}: which "
                "part of the output a head is, is not known here."
            )
        for head in of_layer:
            if not 0 <= head < output.shape[1]:
                raise ValueError(f"layer {layer} ({call.name}) has {output.shape[1]} heads, not head {head}")
        return change(output, layer, of_layer) if of_layer else output

    with intercept_attention(classifier, call_changed):
        logits = logits_of(forward(classifier, inputs))
    missing = sorted(layer for layer in changed if not 0 <= layer < len(seen))
    if missing:
        raise ValueError(f"the model has {len(seen)} attention layers, not layer {missing[0]}")
    return logits
