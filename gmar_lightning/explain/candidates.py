"""Which modules inside a model could be explained, for errors that say that the model itself cannot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from gmar_lightning.explain.attention import recording
from gmar_lightning.explain.inputs import forward, image_key, model_inputs
from gmar_lightning.explain.isolation import undisturbed
from gmar_lightning.explain.measure import measure
from gmar_lightning.explain.sweep import Form

# Modules that are tried, the outermost first; each costs a forward, few of them a backward.
_MOST_TRIED = 200
_MOST_NAMED = 8


def candidates(
    model: nn.Module, given: Mapping[str, Any], under: str | None = None
) -> list[tuple[str, bool]]:
    """Paths of modules that can be explained, tried on some images.

    The outermost module that works is named, none inside it. Asked is for the predicted class, so a module that
    returns an embedding counts as one with as many classes.

    Args:
        model: Where to look.
        given: What it is called with, by name (`inputs.named_inputs`); a few images are enough.
        under: The model's own path, in front of those of its modules.

    Returns:
        Path, and whether it works on the images alone rather than on all that the model is given.
    """
    key = image_key(given)
    alone = {"": given[key]} if key is not None and list(given) != [""] else None
    found: list[tuple[str, bool]] = []
    inside: set[int] = set()
    for path, module in list(model.named_modules())[1 : _MOST_TRIED + 1]:
        if id(module) in inside or not any(True for _ in module.parameters()):
            continue
        for inputs, is_alone in ((given, False), (alone, True)):
            if inputs is not None and _works(module, inputs):
                found.append((f"{under}.{path}" if under else path, is_alone))
                inside |= {id(part) for part in module.modules()}
                break
    return found


def said(found: Sequence[tuple[str, bool]]) -> str:
    """The candidates in a sentence."""
    if not found:
        return "No module inside it can be explained on these inputs."
    named = [f"module={path!r}" + (" (on the images alone)" if alone else "") for path, alone in found]
    more = f" and {len(found) - _MOST_NAMED} more" if len(found) > _MOST_NAMED else ""
    return f"Would work: {', '.join(named[:_MOST_NAMED])}{more}."


def _works(module: nn.Module, given: Mapping[str, Any]) -> bool:
    try:
        with undisturbed(module):
            inputs = model_inputs(module, given)
            # Most modules cannot be called with images at all, or call no attention: seen without a gradient.
            with torch.no_grad(), recording(module) as seen:
                forward(module, inputs)
            if not seen.aside and not seen.calls:
                return False
            with torch.enable_grad():
                measure(module, inputs, None, Form("l1", ("gradient",), 1.0, False, False))
    except Exception:  # whatever a forward makes of inputs that are not its own
        return False
    return True
