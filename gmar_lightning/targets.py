"""Scalars to explain: what `gmar` differentiates, for models whose output is more than class logits.

A target is a callable `(output) -> (batch,)` on whatever the model returns: a tensor, a tuple, a mapping or an
object with attributes. Any callable will do; those here cover the usual tasks, can be pickled and named in YAML, and
say in a caption what they are (`name_of`). Row i may depend on image i alone. A target that has something of its own
for each image says with `for_images(rows)` what it is for part of the batch, rows a slice or a list of indices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["ClassLogit", "DetectionScore", "MaskLogit", "MultiLabel", "Regression", "Similarity"]

# Where the libraries put what a task reads; the first name that is there wins.
_LOGIT_NAMES = ("logits", "out", "predictions", "class_logits")
_EMBEDDING_NAMES = ("image_embeds", "embeddings", "image_features", "pooler_output", "features")
_BOX_NAMES = ("pred_boxes", "boxes")


class ClassLogit:
    """The logit of one class, the same for every image or one per image.

    Args:
        class_index: The class, or one class per image; None takes the predicted class.
        name: Where the logits are in the output; found when None.

    Example:
        >>> ClassLogit(2)({"logits": torch.tensor([[1.0, 2.0, 3.0]])})
        tensor([3.])
    """

    def __init__(self, class_index: int | Sequence[int] | None = None, name: str | None = None) -> None:
        self.class_index, self.name = class_index, name

    def __call__(self, output: Any) -> Tensor:
        """The logit, `(batch,)`."""
        logits = part_of(output, _LOGIT_NAMES, self.name)
        if logits.ndim == 1 or (logits.ndim == 2 and logits.shape[1] == 1):
            return _only_logit(logits.flatten(), self.class_index)
        _check_dims(self, logits, 2, "(batch, classes)")
        if self.class_index is None:
            return logits.amax(-1)
        if isinstance(self.class_index, int):
            return _at(logits, self.class_index, self, "class")
        index = torch.as_tensor(self.class_index, device=logits.device)
        if index.shape != logits.shape[:1] or not 0 <= int(index.min()) <= int(index.max()) < logits.shape[1]:
            raise ValueError(
                f"{self}: needs one of {logits.shape[1]} classes for each of {len(logits)} images"
            )
        return logits.gather(1, index[:, None])[:, 0]

    def __str__(self) -> str:
        which = "the predicted class" if self.class_index is None else f"class {self.class_index}"
        return f"logit of {which}"

    def for_images(self, rows: slice | list[int]) -> ClassLogit:
        """The same target for part of the batch."""
        if self.class_index is None or isinstance(self.class_index, int):
            return self
        return ClassLogit(torch.tensor(list(self.class_index))[rows].tolist(), self.name)


class MaskLogit:
    """The mean logit of one class over a region of a dense output, `(batch, classes, height, width)`.

    Args:
        class_index: The class.
        mask: `(height, width)` or `(batch, height, width)` weights of the output's pixels; None takes the pixels
            that are predicted as the class (all pixels, for an image without any), counted as a constant.
        name: Where the logits are in the output; found when None.

    Example:
        >>> dense = torch.zeros(1, 2, 2, 2)
        >>> dense[0, 1, 0] = 4.0
        >>> MaskLogit(1)(dense), MaskLogit(1, mask=torch.ones(2, 2))(dense)
        (tensor([4.]), tensor([2.]))
    """

    def __init__(self, class_index: int, mask: Tensor | None = None, name: str | None = None) -> None:
        self.class_index, self.mask, self.name = class_index, mask, name

    def __call__(self, output: Any) -> Tensor:
        """The mean logit, `(batch,)`."""
        logits = part_of(output, _LOGIT_NAMES, self.name)
        _check_dims(self, logits, 4, "(batch, classes, height, width)")
        chosen = _at(logits, self.class_index, self, "class")
        mask = self.region(output) if self.mask is None else torch.as_tensor(self.mask)
        weights = mask.to(device=logits.device, dtype=logits.dtype)
        if weights.shape not in (chosen.shape, chosen.shape[1:]):
            raise ValueError(
                f"{self}: the mask has shape {tuple(weights.shape)}, the output {tuple(chosen.shape)}"
            )
        weights = weights.expand_as(chosen)
        return (chosen * weights).sum((1, 2)) / weights.sum((1, 2)).clamp_min(torch.finfo(logits.dtype).tiny)

    def region(self, output: Any) -> Tensor:
        """The pixels predicted as the class (all, for an image without any), `(batch, height, width)`."""
        chosen = part_of(output, _LOGIT_NAMES, self.name).argmax(1) == self.class_index
        return chosen | ~chosen.flatten(1).any(-1)[:, None, None]

    def for_images(self, rows: slice | list[int]) -> MaskLogit:
        """The same target for part of the batch."""
        if self.mask is None or self.mask.ndim == 2:
            return self
        return MaskLogit(self.class_index, self.mask[rows], self.name)

    def __str__(self) -> str:
        region = "the pixels it is predicted for" if self.mask is None else "a mask"
        return f"mean logit of class {self.class_index} over {region}"


class Similarity:
    """Cosine similarity of the image's embedding to a given one: CLIP, SigLIP, DINO, retrieval.

    A text prompt is given as its embedding.

    Args:
        embedding: `(dim,)`, the same for every image, or `(batch, dim)`.
        label: What the embedding stands for, for the caption.
        name: Where the image embedding is in the output; found when None.

    Example:
        >>> Similarity(torch.tensor([1.0, 0.0]), label="a cat")(torch.tensor([[3.0, 4.0]]))
        tensor([0.6000])
    """

    def __init__(self, embedding: Tensor | Sequence[float], label: str = "", name: str | None = None) -> None:
        self.embedding = torch.as_tensor(embedding).detach().cpu()
        if self.embedding.ndim not in (1, 2) or not self.embedding.is_floating_point():
            raise ValueError(
                f"embedding must be numbers (dim,) or (batch, dim), got {tuple(self.embedding.shape)}"
            )
        self.label, self.name = label, name

    def __call__(self, output: Any) -> Tensor:
        """The cosine, `(batch,)`."""
        features = part_of(output, _EMBEDDING_NAMES, self.name)
        _check_dims(self, features, 2, "(batch, dim)")
        wanted = self.embedding.to(device=features.device, dtype=features.dtype)
        if wanted.shape not in (features.shape, features.shape[1:]):
            raise ValueError(
                f"{self}: the embedding has shape {tuple(wanted.shape)}, the model's {tuple(features.shape)}"
            )
        return torch.nn.functional.cosine_similarity(features, wanted.expand_as(features), dim=-1)

    def for_images(self, rows: slice | list[int]) -> Similarity:
        """The same target for part of the batch."""
        return self if self.embedding.ndim == 1 else Similarity(self.embedding[rows], self.label, self.name)

    def __str__(self) -> str:
        return f"similarity to {self.label or 'an embedding'}"


class Regression:
    """One output of a regression head, upwards or downwards.

    Args:
        index: Which output of `(batch, outputs)`; `(batch,)` has index 0 alone.
        sign: 1 explains what raises it, -1 what lowers it.
        name: Where the predictions are in the output; found when None.

    Example:
        >>> Regression(1, sign=-1)(torch.tensor([[1.0, 2.0]]))
        tensor([-2.])
    """

    def __init__(self, index: int = 0, sign: Literal[1, -1] = 1, name: str | None = None) -> None:
        if sign not in (1, -1):
            raise ValueError(f"sign must be 1 or -1, got {sign!r}")
        self.index, self.sign, self.name = index, sign, name

    def __call__(self, output: Any) -> Tensor:
        """The signed prediction, `(batch,)`."""
        values = part_of(output, ("predictions", "logits", "out"), self.name)
        values = values[:, None] if values.ndim == 1 else values
        _check_dims(self, values, 2, "(batch,) or (batch, outputs)")
        return self.sign * _at(values, self.index, self, "output")

    def __str__(self) -> str:
        return f"{'+' if self.sign > 0 else '-'}output {self.index}"


class MultiLabel:
    """The sum of the logits of several labels that may hold at once.

    Args:
        labels: Indices of the labels; None takes every label with a positive logit (the largest one, for an image
            without any), counted as a constant choice.
        name: Where the logits are in the output; found when None.

    Example:
        >>> logits = torch.tensor([[1.0, -2.0, 3.0]])
        >>> MultiLabel()(logits), MultiLabel([0, 1])(logits)
        (tensor([4.]), tensor([-1.]))
    """

    def __init__(self, labels: Sequence[int] | None = None, name: str | None = None) -> None:
        self.labels, self.name = None if labels is None else tuple(labels), name

    def __call__(self, output: Any) -> Tensor:
        """The summed logits, `(batch,)`."""
        logits = part_of(output, _LOGIT_NAMES, self.name)
        _check_dims(self, logits, 2, "(batch, labels)")
        if self.labels is not None:
            return torch.stack([_at(logits, label, self, "label") for label in self.labels]).sum(0)
        with torch.no_grad():
            chosen = logits > 0
            largest = logits == logits.amax(-1, keepdim=True)
            chosen = torch.where(chosen.any(-1, keepdim=True), chosen, largest)
        return (logits * chosen).sum(-1)

    def __str__(self) -> str:
        which = "the labels predicted" if self.labels is None else f"labels {list(self.labels)}"
        return f"logits of {which}"


class DetectionScore:
    """The class logit of one detection of a DETR-like model, `logits (batch, queries, classes)`.

    Args:
        query: Which object query; or give a box.
        box: `(4,)`, the query whose predicted box overlaps it most is taken, image by image (boxes as the model
            returns them, centre and size, relative to the image).
        class_index: The class; None takes the best one of the query, without the last, "no object".
        name: Where the logits are in the output; found when None.

    Example:
        >>> output = {"pred_logits": torch.tensor([[[1.0, 5.0, 0.0], [2.0, 0.0, 9.0]]])}
        >>> DetectionScore(query=0)(output), DetectionScore(query=1)(output)
        (tensor([5.]), tensor([2.]))
    """

    def __init__(
        self,
        query: int | None = None,
        box: Sequence[float] | None = None,
        class_index: int | None = None,
        name: str | None = None,
    ) -> None:
        if (query is None) == (box is None):
            raise ValueError("DetectionScore needs a query or a box, and not both")
        if box is not None and len(box) != 4:
            raise ValueError(f"box must be (centre x, centre y, width, height), got {box!r}")
        self.query, self.box = query, None if box is None else tuple(float(side) for side in box)
        self.class_index, self.name = class_index, name

    def __call__(self, output: Any) -> Tensor:
        """The logit, `(batch,)`."""
        logits = part_of(output, ("pred_logits", *_LOGIT_NAMES), self.name)
        _check_dims(self, logits, 3, "(batch, queries, classes)")
        if self.query is not None:
            chosen = _at(logits, self.query, self, "query")
        else:
            chosen = logits[torch.arange(len(logits), device=logits.device), self._nearest(output)]
        if self.class_index is not None:
            return _at(chosen, self.class_index, self, "class")
        return chosen[:, :-1].amax(-1)

    def _nearest(self, output: Any) -> Tensor:
        boxes = part_of(output, _BOX_NAMES, None).detach()
        return _overlap(boxes, torch.tensor(self.box).to(boxes)).argmax(-1)

    def __str__(self) -> str:
        which = f"query {self.query}" if self.query is not None else f"the detection at {self.box}"
        return f"{'best class' if self.class_index is None else f'class {self.class_index}'} of {which}"


def part_of(output: Any, names: Sequence[str], name: str | None = None) -> Tensor:
    """The tensor of an output that a target reads.

    Args:
        output: A tensor, a tuple (its first tensor counts), a mapping or an object with attributes.
        names: Names to look for, in this order.
        name: The one name that counts, instead of `names`.

    Raises:
        ValueError: Saying what was returned instead.
    """
    if isinstance(output, Tensor) and name is None:
        return output
    for wanted in names if name is None else (name,):
        value = output.get(wanted) if isinstance(output, Mapping) else getattr(output, wanted, None)
        if isinstance(value, Tensor):
            return value
    if name is None and isinstance(output, (tuple, list)):
        for value in output:
            if isinstance(value, Tensor):
                return value
    raise ValueError(f"the model returned {described(output)}; looked for {name or ', '.join(names)}")


def name_of(target: Any) -> str:
    """What captions, records and errors call a target: a function's name, else what `str` says."""
    inner = getattr(target, "func", target)  # a partial is called like its function
    return getattr(inner, "__name__", None) or str(target)


def described(output: Any) -> str:
    """An output in words: its kind, names and shapes."""
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)} ({str(output.dtype).removeprefix('torch.')})"
    if isinstance(output, Mapping):
        inside = ", ".join(f"{key}: {_brief(value)}" for key, value in output.items())
        return f"{type(output).__name__} with {inside or 'nothing'}"
    if isinstance(output, (tuple, list)):
        return f"a {type(output).__name__} of {len(output)}: {', '.join(map(_brief, output))}"
    fields = getattr(output, "__dict__", {})
    inside = ", ".join(f"{key}: {_brief(value)}" for key, value in fields.items())
    return f"{type(output).__name__} with {inside}" if inside else type(output).__name__


def _brief(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _check_dims(target: object, tensor: Tensor, dims: int, expected: str) -> None:
    if tensor.ndim != dims:
        raise ValueError(f"{target}: expected {expected}, got shape {tuple(tensor.shape)}")


def _at(tensor: Tensor, index: int, target: object, what: str) -> Tensor:
    if not 0 <= index < tensor.shape[1]:
        raise ValueError(f"{target}: the output has {tensor.shape[1]} of them, no {what} {index}")
    return tensor[:, index]


def _only_logit(logits: Tensor, class_index: int | Sequence[int] | None) -> Tensor:
    # One logit decides between two classes: its sign says for which it speaks.
    if class_index is None:
        return torch.where(logits.detach() >= 0, logits, -logits)
    wanted = torch.as_tensor(class_index, device=logits.device).expand_as(logits)
    if not 0 <= int(wanted.min()) <= int(wanted.max()) <= 1:
        raise ValueError(f"one logit knows the classes 0 and 1, not {class_index}")
    return torch.where(wanted == 1, logits, -logits)


def _overlap(boxes: Tensor, box: Tensor) -> Tensor:
    """Intersection over union of boxes `(..., 4)` and one box, as centre and size."""
    low = torch.maximum(boxes[..., :2] - boxes[..., 2:] / 2, box[:2] - box[2:] / 2)
    high = torch.minimum(boxes[..., :2] + boxes[..., 2:] / 2, box[:2] + box[2:] / 2)
    shared = (high - low).clamp_min(0).prod(-1)
    union = boxes[..., 2:].prod(-1) + box[2:].prod(-1) - shared
    return shared / union.clamp_min(torch.finfo(boxes.dtype).tiny)
