"""Whether the scores of a run's first probe are those of its classes: what the rest of the run says of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules import module as module_hooks

from gmar_lightning.explain.errors import UnsupportedModelError
from gmar_lightning.explain.head import WAYS_OUT
from gmar_lightning.explain.inputs import classifier_of, forward, logits_of, model_inputs
from gmar_lightning.explain.isolation import undisturbed
from gmar_lightning.explain.output import predicted
from gmar_lightning.monitor.explanation import Explanation
from gmar_lightning.monitor.probe import ProbeBatch
from gmar_lightning.monitor.processes import on_every_process
from gmar_lightning.monitor.settings import ProbeSettings


def with_known_output(explanation: Explanation, probe: ProbeBatch, settings: ProbeSettings) -> Explanation:
    """What is not certain of the scores by themselves, by what the run says: its metrics, its losses, its labels."""
    if explanation.output is not None or explanation.logits is None:
        return explanation
    # Labels are class indices here (`monitor.batches`): one class holds, which is what a softmax says.
    by_labels = None if probe.labels is None else "logits"
    return replace(explanation, output=settings.known.output or by_labels)


def recorded_classes(explanation: Explanation) -> dict[str, tuple[Any, ...]]:
    """What a record says of classes; nothing when the explained number is no class logit."""
    if explanation.logits is None or explanation.targets is None:
        return {}
    logits, chances = torch.from_numpy(explanation.logits), explanation.probabilities
    unknown = np.full(len(logits), np.nan)
    return {
        "targets": tuple(explanation.targets.tolist()),
        "predictions": tuple(predicted(logits, explanation.output).tolist()),
        "probabilities": tuple((unknown if chances is None else chances.max(-1)).tolist()),
    }


def explained_classes(
    model: nn.Module, probe: ProbeBatch, explanation: Explanation, settings: ProbeSettings
) -> str:
    """Say which class scores are explained, and refuse features in their place.

    As many scores as somebody names classes, or the largest label being that of the last score, is enough. If not,
    one forward of the whole model over one image shows whether it goes on from them.

    Args:
        model: The model, held whole by every process.
        probe: The probe images.
        explanation: What was explained of them.
        settings: Names the classifier, and what is known of its classes.

    Returns:
        `classes=10`; `classes=192?` where nothing confirms it; the name of a callable target.

    Raises:
        UnsupportedModelError: The scores are features; says what goes on from them.
    """
    if explanation.logits is None:
        return f"target={getattr(settings.target, '__name__', settings.target)}"
    width, known = explanation.logits.shape[1], settings.known
    if width == 1:
        return "classes=2 (one logit)"
    last_label = -1 if probe.labels is None else int(probe.labels.max())
    if width in known.counts.values() or last_label == width - 1:
        return f"classes={width}"
    # Sharded weights are put together by all processes at once.
    found = on_every_process(lambda: _goes_on(model, probe, settings, width))
    why = found[0] or _too_few(settings, width)
    if why:
        raise UnsupportedModelError(f"features are no class scores: {why}. {WAYS_OUT}")
    return f"classes={width}?"


def _too_few(settings: ProbeSettings, width: int) -> str:
    known = settings.known
    firm = {name: known.counts[name] for name in known.firm}
    if not firm or width > min(firm.values()):
        return ""
    name = min(firm, key=lambda name: firm[name])
    return f"the forward pass returns {width} numbers for each image, and {name} has {firm[name]} classes"


def _goes_on(model: nn.Module, probe: ProbeBatch, settings: ProbeSettings, width: int) -> str:
    """What computes something else from the explained scores; empty when nothing does."""
    classifier = classifier_of(model, settings.module)
    ran: set[nn.Module] = set()

    def note(module: nn.Module, args: object, output: object) -> None:
        ran.add(module)

    final = None
    handle = module_hooks.register_module_forward_hook(note)
    try:
        with undisturbed(model), torch.no_grad(), settings.precision():
            final = logits_of(forward(model, model_inputs(model, probe.images[:1]))).shape[1]
    except Exception:
        # A model without a forward of its own, or with another one, is no witness.
        if classifier is model:
            return ""
    finally:
        handle.remove()
    what = f"module={settings.module!r}" if settings.module else "the forward pass"
    if final not in (None, width) and classifier in ran and classifier is not model:
        return f"{what} returns {width} numbers for each image, and {type(model).__name__} goes on to {final}"
    inside = ran if classifier is model else set(classifier.modules())
    for name, rows in _readers(model, inside, width):
        return f"{what} returns {width} numbers for each image, and {name} goes on from so many to {rows}"
    return ""


def _readers(model: nn.Module, inside: set[nn.Module], width: int) -> Iterator[tuple[str, int]]:
    """Weights of modules outside the classifier that take so many numbers to another number of them."""
    for path, module in model.named_modules():
        if module in inside:
            continue
        for name, weight in module.named_parameters(recurse=False):
            if weight.ndim == 2 and weight.shape[1] == width != weight.shape[0]:
                yield f"{path}.{name}", weight.shape[0]
