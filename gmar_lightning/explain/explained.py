"""The number that is explained, read off whatever the model returned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gmar_lightning.explain.attention import AttentionCall
from gmar_lightning.explain.errors import UnsupportedModelError
from gmar_lightning.explain.inputs import Goal, logits_of
from gmar_lightning.explain.output import Output, classes_of, kind_of, predicted, score_of
from gmar_lightning.targets import MaskLogit, described, name_of


@dataclass(frozen=True, eq=False)
class Explained:
    """The explained number of each image.

    Attributes:
        score: `(batch,)`, attached to the model's graph.
        logits: `(batch, classes)`; None where a callable says what is explained.
        targets: `(batch,)` classes; None likewise.
        kind: What the logits are, see `output.kind_of`; None likewise, and when it is not known.
    """

    score: Tensor
    logits: Tensor | None = None
    targets: Tensor | None = None
    kind: Output | None = None


def explained(output: Any, goal: Goal, batch: int, kind: Output | None = None) -> Explained:
    """What is explained of a model's output.

    Args:
        output: What the model returned for `batch` images.
        goal: Class indices, a callable `(output) -> (batch,)`, or None for the predicted class.
        batch: Number of images.
        kind: What class scores in it are, where the user says so.

    Raises:
        UnsupportedModelError: When the output holds no such number; says what was returned.
        ValueError: For a class that does not exist.
    """
    if goal is not None and not isinstance(goal, Tensor):
        return Explained(_called(goal, output, batch))
    logits = logits_of(output)
    kind = kind_of(logits, kind)
    targets = predicted(logits, kind) if goal is None else goal.to(logits.device)
    if targets.max() >= classes_of(logits):
        raise ValueError(
            f"targets name class {int(targets.max())}, but the model has {classes_of(logits)} classes"
        )
    return Explained(score_of(logits, targets, kind), logits, targets, kind)


def runner_up(logits: Tensor, targets: Tensor) -> Tensor:
    """The most probable class beside the explained one, `(batch,)`."""
    return logits.scatter(1, targets[:, None].to(logits.device), -torch.inf).argmax(-1)


def held(goal: Goal, output: Any) -> Goal:
    """A goal that chooses by the output keeps its choice: a changed output is then asked for the same pixels."""
    if isinstance(goal, MaskLogit) and goal.mask is None:
        return MaskLogit(goal.class_index, goal.region(output), goal.name)
    return goal


def _called(target: Any, output: Any, batch: int) -> Tensor:
    score = number_of(target, output, batch)
    if not score.is_floating_point() or not score.requires_grad:
        raise UnsupportedModelError(
            f"the target {name_of(target)} returned {described(score)} that cannot be differentiated: it is "
            f"detached, counted, rounded or an index. The model returned {described(output)}."
        )
    return score


def number_of(target: Any, output: Any, batch: int) -> Tensor:
    """The number of each image, `(batch,)`, that a callable makes of a model's output.

    Raises:
        UnsupportedModelError: When it makes no such number; says what was returned.
    """
    name = name_of(target)
    try:
        score = target(output)
    except Exception as error:
        raise UnsupportedModelError(
            f"the target {name} failed on what the model returned, {described(output)}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if isinstance(score, Tensor) and score.shape == (batch, 1):
        score = score[:, 0]
    if not isinstance(score, Tensor) or score.shape != (batch,):
        raise UnsupportedModelError(
            f"the target {name} returned {described(score)} for {batch} images; expected a tensor of shape "
            f"({batch},), one number per image. The model returned {described(output)}."
        )
    return score


def check_images_apart(score: Tensor, call: AttentionCall, batch: int, target: Any) -> None:
    """Refuse a number of one image that depends on the other images of the batch.

    Asked of the last attention layer alone: the cost is the backward of what comes after it.

    Args:
        score: `(batch,)`.
        call: The last call, arranged by image.
        batch: Number of images.
        target: The callable that computed the score, for the message.

    Raises:
        UnsupportedModelError: When the images are mixed.
    """
    if batch == 1 or call.edge is None:
        return
    edge: Any = call.edge
    (grad,) = torch.autograd.grad(score[0], edge, retain_graph=True, allow_unused=True)
    if grad is not None and (call.arrange(grad).unflatten(0, (batch, -1))[1:] != 0).any():
        raise UnsupportedModelError(
            f"the number that {name_of(target)} returns for one image depends on the other images of the batch "
            "(a similarity within the batch, a normalisation over it): row i must depend on image i alone."
        )
