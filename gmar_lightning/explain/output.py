"""What class scores say: which class is predicted, which number of a class is explained, how probable it is."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

# What a model returns for its classes: scores of which one class holds; probabilities already; or scores of several
# labels that may hold at once.
Output = Literal["logits", "probabilities", "multilabel"]

# How far a sum of probabilities may lie from 1: rounding, of bfloat16 too.
_SUM = 4e-3
# What changes the shape of a tensor, or takes part of it, and not its values.
_SHAPES = (
    "Select",
    "Slice",
    "View",
    "UnsafeView",
    "Squeeze",
    "Unsqueeze",
    "ReshapeAlias",
    "Alias",
    "Clone",
    "ToCopy",
)


def check_output(output: object) -> None:
    """Refuse what names no kind of output.

    Raises:
        ValueError: With the allowed values.
    """
    if output is not None and output not in get_args(Output):
        choices = ", ".join(map(repr, get_args(Output)))
        raise ValueError(f"output={output!r} is unknown; choose one of {choices}, or None to find out")


def kind_of(scores: Tensor, given: Output | None = None) -> Output | None:
    """What class scores are, as far as it can be said for certain.

    Rows of probabilities are known by their sum, those of several labels by the sigmoid they come from. The softmax
    of log-probabilities is what they are the logarithm of, so they count as logits; and so does a single score,
    which decides between two classes. Scores of one class and scores of several labels look alike.

    Args:
        scores: `(batch, classes)`.
        given: What the user says.

    Returns:
        The kind; None when nothing is known.
    """
    if given is not None:
        return given
    rows = scores.detach().double()
    if _made_by_sigmoid(scores):
        return "probabilities"
    if scores.shape[1] == 1:
        return "logits"
    if rows.min() >= 0 and ((rows.sum(-1) - 1).abs() < _SUM).all():
        return "probabilities"
    return "logits" if rows.max() <= 0 and (rows.logsumexp(-1).abs() < _SUM).all() else None


def classes_of(scores: Tensor) -> int:
    """How many classes scores `(batch, scores)` tell apart: a single one decides between two."""
    return max(2, scores.shape[1])


def predicted(scores: Tensor, kind: Output | None = None) -> Tensor:
    """The predicted class, `(batch,)`; of several labels, the strongest."""
    if scores.shape[1] > 1:
        return scores.argmax(-1)
    return (scores[:, 0] >= (0.5 if kind == "probabilities" else 0.0)).long()


def score_of(scores: Tensor, classes: Tensor, kind: Output | None = None) -> Tensor:
    """The score of a class of each image, `(batch,)`; a single score speaks for class 1, its opposite for class 0."""
    if scores.shape[1] > 1:
        return scores.gather(1, classes[:, None].to(scores.device))[:, 0]
    one = scores[:, 0]
    return torch.where(classes.to(one.device) == 1, one, (1 if kind == "probabilities" else 0) - one)


def probabilities(scores: Tensor, kind: Output | None) -> Tensor | None:
    """How probable each class is, `(batch, classes)`, two columns for a single score; None when nothing is known."""
    if kind is None:
        return None
    if scores.shape[1] == 1:
        chance = scores if kind == "probabilities" else scores.sigmoid()
        return torch.cat([1 - chance, chance], 1)
    if kind == "probabilities":
        return scores
    return scores.sigmoid() if kind == "multilabel" else scores.softmax(-1)


def loss_of(scores: Tensor, classes: Tensor, kind: Output | None = None) -> Tensor:
    """Minus the logarithm of the probability of a class of each image, `(batch,)`: cross entropy, for logits."""
    if kind == "probabilities":
        return -score_of(scores, classes, kind).log()
    if kind == "multilabel" or scores.shape[1] == 1:
        return F.softplus(-score_of(scores, classes))
    return F.cross_entropy(scores, classes.to(scores.device), reduction="none")


def _made_by_sigmoid(scores: Tensor) -> bool:
    node = scores.grad_fn
    while node is not None and type(node).__name__.partition("Backward")[0] in _SHAPES:
        node = node.next_functions[0][0]
    return type(node).__name__.startswith("SigmoidBackward")
