"""What goes into a model and what comes out, prepared for an explanation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from gmar_lightning.explain.errors import UnsupportedModelError, WrongModuleError
from gmar_lightning.explain.lifted import lifting
from gmar_lightning.explain.nested import leaves_of, rows_of, with_leaves

# Which number is explained: class indices, a callable on the model's output, or None for the predicted class.
Goal = Tensor | Callable[[Any], Tensor] | None
# From a batch to what the forward takes, see `gmar`; None for images, or a mapping of keyword arguments.
Inputs = Callable[[Any], Any] | None

# The key, among a model's inputs by name, under which stands how they become its arguments.
_ARGUMENTS = "\0arguments"


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


@dataclass(frozen=True, eq=False)
class Arguments:
    """How leaves become the arguments of a forward.

    Attributes:
        nested: The arguments as they were given: a tuple, or a mapping of keyword arguments.
        image: Path of the images among the leaves; None leaves it to `image_key`.
    """

    nested: Any
    image: str | None = None


def model_inputs(classifier: nn.Module, batch: Any, inputs: Inputs = None) -> dict[str, Any]:
    """The batch on the model's device and in its precision, safe to differentiate through.

    Args:
        classifier: Says device and precision.
        batch: Images, or a mapping of keyword arguments; with `inputs`, whatever that takes.
        inputs: Makes the arguments of the forward, see `gmar`.

    Returns:
        What the forward takes, by name; a plain image tensor sits under the empty name.
    """
    parameter = next((p for p in classifier.parameters() if p.is_floating_point()), None)
    return {key: _fitted(value, parameter) for key, value in named_inputs(batch, inputs).items()}


def named_inputs(batch: Any, inputs: Inputs = None) -> dict[str, Any]:
    """What the forward takes by name, untouched: leaves of nested arguments by their path.

    Raises:
        ValueError: When `inputs` fails, or returns what is no argument of a forward.
    """
    if inputs is None:
        return dict(batch) if isinstance(batch, Mapping) else {"": batch}
    try:
        given = inputs(batch)
    except Exception as error:
        raise ValueError(f"inputs= failed on the batch: {type(error).__name__}: {error}") from error
    image = None
    if _names_image(given):
        given, image = given[0], str(given[1])
    if isinstance(given, Tensor):
        return {"": given}
    if not isinstance(given, (tuple, list, Mapping)):
        raise ValueError(
            f"inputs= returned {type(given).__name__}; expected what the forward takes: a tensor, a tuple of "
            "arguments or a mapping of keyword arguments"
        )
    leaves = leaves_of(given)
    if image is not None and not (isinstance(leaves.get(image), Tensor) and leaves[image].ndim == 4):
        raise ValueError(
            f"inputs= says that {image!r} are the images (batch, channels, height, width), and returned "
            f"{', '.join(f'{key}: {tuple(x.shape)}' for key, x in leaves.items() if isinstance(x, Tensor))}"
        )
    return {**leaves, _ARGUMENTS: Arguments(given, image)}


def _names_image(given: Any) -> bool:
    """Whether this is a pair of the arguments and the name or position of the images among them."""
    return (
        isinstance(given, tuple)
        and len(given) == 2
        and isinstance(given[0], (tuple, list, Mapping))
        and isinstance(given[1], (str, int))
    )


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
        if "" in inputs:
            return classifier(inputs[""])
        arguments = inputs.get(_ARGUMENTS)
        given = inputs if arguments is None else with_leaves(arguments.nested, inputs)
        return classifier(**given) if isinstance(given, Mapping) else classifier(*given)


# Words of errors that say that a tensor does not fit.
_OF_SHAPE = ("shape", "size", "dimension", "channels", "mat1")


class ForwardError(Exception):
    """Carries an error of the model's forward out of the recording."""


def watched_forward(classifier: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """`forward` inside a recording."""
    try:
        return forward(classifier, inputs)
    except UnsupportedModelError:
        raise
    except (NotImplementedError, ValueError) as error:  # wrong arguments, missing operators
        raise ForwardError from error
    except (TypeError, IndexError, KeyError, AttributeError, AssertionError, RuntimeError) as error:
        words = str(error).lower()
        of_shape = any(word in words for word in _OF_SHAPE) and "memory" not in words
        if isinstance(error, RuntimeError) and not of_shape:
            raise  # of the moment: the device, the memory
        tried = ", ".join(
            f"{k or 'images'} {tuple(v.shape)}" for k, v in inputs.items() if isinstance(v, Tensor)
        )
        raise UnsupportedModelError(
            f"the forward of {type(classifier).__name__} failed on what it was given ({tried}): "
            f"{type(error).__name__}: {error}. For other arguments pass inputs=, a callable from the batch "
            "to what it takes; with module= name a part that takes whole images."
        ) from error


def raise_from_forward(failed: ForwardError, classifier: nn.Module, inputs: Mapping[str, Any]) -> None:
    """An error that the recording brings about is a refusal; the model's own stays as it is."""
    error = failed.__cause__
    assert error is not None
    try:
        with torch.no_grad():
            forward(classifier, inputs)
    except Exception:
        raise error from None
    raise UnsupportedModelError(
        "the model runs, but not with gradients and its attention led through scaled_dot_product_attention, from "
        f"which maps are read (soft-capped or flexible attention, an opaque kernel): {error}"
    ) from error


def logits_of(output: Any) -> Tensor:
    """The `(batch, classes)` logits in what a model returned.

    Raises:
        WrongModuleError: Naming what was returned instead.
    """
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if isinstance(logits, Tensor) and logits.ndim in (1, 2):
        return logits if logits.ndim == 2 else logits[:, None]
    seen = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(output).__name__
    raise WrongModuleError(
        f"the forward pass returned {seen}; expected logits (batch, classes), as a tensor or in .logits. "
        "Name with module= a part that returns class scores, backbone and head together, or say what to explain with "
        "a callable target (gmar_lightning.targets)."
    )


def image_key(inputs: Mapping[str, Any]) -> str | None:
    """Which input is the image `(batch, channels, height, width)`; None for token sequences."""
    arguments = inputs.get(_ARGUMENTS)
    if arguments is not None and arguments.image is not None:
        return arguments.image
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
    plain = inputs.get("")
    if isinstance(plain, Tensor) and plain.ndim != 4:
        raise ValueError(f"images must be (batch, channels, height, width), got {tuple(plain.shape)}")
    key = image_key(inputs)
    tensors = [value for value in inputs.values() if isinstance(value, Tensor) and value.ndim]
    if not tensors:
        raise ValueError("no tensor among the inputs: pass images, or a mapping of the model's arguments")
    size = len(tensors[0] if key is None else inputs[key])
    if size == 0:
        raise ValueError("the batch is empty")
    return size


def micro_batches(batch: Any, count: int, targets: Goal, size: int) -> list[tuple[Any, Goal]]:
    """A batch of `count` samples, and its targets, cut into parts of at most `size` samples."""
    parts = [slice(start, start + size) for start in range(0, count, size)]
    return [(rows_of(batch, rows, count), goal_of(targets, rows)) for rows in parts]


def goal_of(targets: Goal, rows: slice | list[int]) -> Goal:
    """The targets of part of a batch."""
    if isinstance(targets, Tensor):
        return targets[rows]
    # A target that has something for each image says what part of the batch it stands for.
    return targets.for_images(rows) if hasattr(targets, "for_images") else targets  # pyright: ignore


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
