"""What a head still contributes: the forward pass again, with its output zeroed as it is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmar_lightning.explain.errors import UnsupportedModelError
from gmar_lightning.explain.inputs import classifier_of, forward, logits_of, model_inputs
from gmar_lightning.explain.intercept import CallArguments, intercept_attention
from gmar_lightning.explain.isolation import undisturbed


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
    heads: Sequence[tuple[int, int]],
    module: str | None = None,
    logits: Tensor | None = None,
) -> HeadAblation:
    """Zero the output of some attention heads and measure what changes.

    Cost: two forwards, or one when the logits of the intact model are handed in. Nothing about the model
    changes.

    Args:
        model: As for `gmar`.
        images: As for `gmar`.
        targets: `(batch,)` class indices; None takes the class the intact model predicts.
        heads: `(layer, head)` pairs, layers counted in forward order as in `GMARResult.layers`.
        module: Dotted path of the classifier inside `model`.
        logits: `(batch, classes)` of the intact model, if they are known.

    Returns:
        The changes.

    Raises:
        ValueError: When a layer or head does not exist.
    """
    classifier = classifier_of(model, module)
    with undisturbed(classifier), torch.no_grad():
        inputs = model_inputs(classifier, images)
        intact = logits_of(forward(classifier, inputs)) if logits is None else logits
        without = _logits_without(classifier, inputs, heads)
    intact, without = intact.float(), without.float()
    goals = intact.argmax(-1) if targets is None else torch.as_tensor(targets, device=intact.device)
    index = goals[:, None]
    return HeadAblation(
        logit_change=(without.gather(1, index) - intact.gather(1, index))[:, 0],
        loss_change=F.cross_entropy(without, goals, reduction="none")
        - F.cross_entropy(intact, goals, reduction="none"),
        targets=goals,
        predictions=without.argmax(-1),
    )


def _logits_without(
    classifier: nn.Module, inputs: dict[str, Any], heads: Sequence[tuple[int, int]]
) -> Tensor:
    removed: dict[int, list[int]] = {}
    for layer, head in heads:
        removed.setdefault(layer, []).append(head)
    seen: list[int] = []

    def zero(call: CallArguments) -> Tensor:
        layer = len(seen)
        seen.append(call.q.shape[1])
        output = call.compute()
        if layer in removed and output.ndim != 4:
            raise UnsupportedModelError(
                f"{call.name} ({call.owner}) keeps its heads merged with other axes, {tuple(output.shape)}: which "
                "part of the output a head is, is not known here."
            )
        for head in removed.get(layer, ()):
            if not 0 <= head < output.shape[1]:
                raise ValueError(f"layer {layer} ({call.name}) has {output.shape[1]} heads, not head {head}")
            output[:, head] = 0
        return output

    with intercept_attention(classifier, zero):
        logits = logits_of(forward(classifier, inputs))
    missing = sorted(layer for layer in removed if not 0 <= layer < len(seen))
    if missing:
        raise ValueError(f"the model has {len(seen)} attention layers, not layer {missing[0]}")
    return logits
