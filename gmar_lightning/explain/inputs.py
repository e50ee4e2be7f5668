"""What goes into a model and what comes out, prepared for an explanation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from gmar_lightning.explain.errors import UnsupportedModelError
from gmar_lightning.explain.lifted import lifting

# Which number is explained: class indices, a callable on the model's output, or None for the predicted class.
Goal = Tensor | Callable[[Any], Tensor] | None


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


def forward(classifier: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """Run the classifier on what `model_inputs` prepared."""
    with lifting():
        return classifier(inputs[""]) if "" in inputs else classifier(**inputs)


def logits_of(output: Any) -> Tensor:
    """The `(batch, classes)` logits in what a model returned.

    Raises:
        UnsupportedModelError: Naming what was returned instead.
    """
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if isinstance(logits, Tensor) and logits.ndim in (1, 2):
        return logits if logits.ndim == 2 else logits[:, None]
    seen = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(output).__name__
    raise UnsupportedModelError(
        f"the forward pass returned {seen}; expected logits (batch, classes), as a tensor or in .logits. "
        "Name with module= a part that returns class scores, backbone and head together, or say what to explain with "
        "a callable target (gmar_lightning.targets)."
    )


def image_key(inputs: Mapping[str, Any]) -> str | None:
    """Which input is the image `(batch, channels, height, width)`; None for token sequences."""
    for key, value in inputs.items():
        if isinstance(value, Tensor) and value.ndim == 4 and "mask" not in key:
            return key
    return None


def padding_of(inputs: Mapping[str, Any], tokens: int) -> Tensor | None:
    """`(batch, tokens)`, 0 at padding, from the `attention_mask` of a text model; None without one.

    Raises:
        UnsupportedModelError: When the mask does not cover the tokens that the attention layers see.
    """
    mask = inputs.get("attention_mask")
    if image_key(inputs) is not None or not isinstance(mask, Tensor):
        return None
    if mask.ndim != 2 or mask.shape[1] != tokens:
        raise UnsupportedModelError(
            f"attention_mask has shape {tuple(mask.shape)} while the attention layers see {tokens} tokens; "
            "expected (batch, tokens), 0 at padding."
        )
    return mask


def batch_size(inputs: Mapping[str, Any]) -> int:
    """Number of images (or sequences) in the batch.

    Raises:
        ValueError: When there is none, or the images are no images.
    """
    for key, value in inputs.items():
        if isinstance(value, Tensor) and value.ndim:
            if key == "" and value.ndim != 4:
                raise ValueError(f"images must be (batch, channels, height, width), got {tuple(value.shape)}")
            if len(value) == 0:
                raise ValueError("the batch is empty")
            return len(value)
    raise ValueError("no tensor among the inputs: pass images, or a mapping of the model's arguments")


def micro_batches(inputs: Mapping[str, Any], targets: Goal, size: int) -> list[tuple[dict[str, Any], Goal]]:
    """Inputs and targets cut into parts of at most `size` images."""
    batch = batch_size(inputs)
    parts = []
    for start in range(0, batch, size):
        rows = slice(start, start + size)
        part = {key: value[rows] if _is_batched(value, batch) else value for key, value in inputs.items()}
        parts.append((part, _goal_part(targets, rows)))
    return parts


def _goal_part(targets: Goal, rows: slice) -> Goal:
    if isinstance(targets, Tensor):
        return targets[rows]
    # A target that has something for each image says what part of the batch it stands for.
    return targets.for_images(rows) if hasattr(targets, "for_images") else targets  # pyright: ignore


def _is_batched(value: Any, batch: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == batch


def checked_targets(targets: Any, batch: int) -> Goal:
    """Targets as `(batch,)` class indices; a callable and None as they are.

    Raises:
        ValueError: For anything else.
    """
    if targets is None or (callable(targets) and not isinstance(targets, Tensor)):
        return cast(Goal, targets)
    goals = torch.as_tensor(targets)
    if goals.shape != (batch,) or goals.is_floating_point() or goals.dtype == torch.bool:
        raise ValueError(
            f"targets must be {batch} class indices, one per image; got {tuple(goals.shape)} of {goals.dtype}"
        )
    if goals.min() < 0:
        raise ValueError(f"targets must be class indices >= 0; got {int(goals.min())}")
    return goals.clone().long() if goals.is_inference() else goals.long()
