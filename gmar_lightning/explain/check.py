"""Whether a model can be explained, and what would be shown: the verdict, without the pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gmar_lightning.explain.errors import UnsupportedModelError
from gmar_lightning.explain.gmar import gmar
from gmar_lightning.explain.inputs import Goal, classifier_of, model_inputs
from gmar_lightning.explain.isolation import undisturbed
from gmar_lightning.explain.lifted import with_gradients_lifted
from gmar_lightning.explain.measure import Measured, measure
from gmar_lightning.explain.sweep import Form


@dataclass(frozen=True)
class Verdict:
    """What was found of a model; prints as a few lines.

    Attributes:
        supported: Whether heads can be scored.
        reason: Why not; empty when they can.
        layers: Module path of each attention layer.
        heads: Heads of each layer.
        grid: Patches of the picture, `(height, width)`; None without a picture, and for texts.
        prefix: Tokens in front of the patches; None without a picture.
        readout: Which tokens the classifier reads; empty without a picture.
        shown: What is explained, and what the picture covers.
    """

    supported: bool
    reason: str = ""
    layers: tuple[str, ...] = ()
    heads: tuple[int, ...] = ()
    grid: tuple[int, int] | None = None
    prefix: int | None = None
    readout: str = ""
    shown: str = ""

    def __str__(self) -> str:
        if not self.supported:
            return f"not supported: {self.reason}"
        heads = ", ".join(map(str, dict.fromkeys(self.heads)))
        grid = (
            f"{self.grid[0]} x {self.grid[1]} patches after {self.prefix} other tokens"
            if self.grid
            else "no grid"
        )
        lines = ["supported", f"  layers   {len(self.layers)}, {self.layers[0]} to {self.layers[-1]}"]
        lines += [f"  heads    {heads}", f"  grid     {grid}", f"  reads    {self.readout or 'not derived'}"]
        return "\n".join([*lines, f"  shown    {self.shown}"])


def check(
    model: nn.Module, images: Tensor | Mapping[str, Any], targets: Goal = None, *, module: str | None = None
) -> Verdict:
    """Find out whether a model can be explained, and what would be shown; nothing about the model changes.

    Args:
        model: As for `gmar`.
        images: As for `gmar`; a forward that fails on them is a refusal too.
        targets: As for `gmar`.
        module: As for `gmar`.

    Returns:
        The verdict; a refusal is one with `supported=False` and the `reason`.

    Raises:
        ValueError: For arguments that do not fit.
    """
    try:
        gmar(model, images, targets, module=module)
        classifier = classifier_of(model, module)
        with undisturbed(classifier):
            # One image: as many images as tokens could not be told apart.
            one = {
                k: v[:1] if isinstance(v, Tensor) else v for k, v in model_inputs(classifier, images).items()
            }
            goal = targets[:1] if isinstance(targets, Tensor) else targets
            seen = with_gradients_lifted(lambda: measure(classifier, one, goal, Form()))
    except UnsupportedModelError as error:
        return Verdict(False, str(error))
    assert seen is not None, "one image is never as many as there are tokens"
    return _verdict(seen)


def _verdict(seen: Measured) -> Verdict:
    picture, logits = seen.picture, seen.explained.logits
    explained = "a callable's number" if logits is None else f"one of {max(2, logits.shape[1])} class scores"
    return Verdict(
        True,
        layers=seen.layers,
        heads=tuple(layer.importance.shape[1] for layer in seen.numbers),
        grid=None if picture is None else picture.layout.grid,
        prefix=None if picture is None else picture.layout.prefix,
        readout="" if picture is None else _words(picture.start[0]),
        shown=f"{explained}; picture: {seen.scope}",
    )


def _words(row: Tensor) -> str:
    """A readout row `(tokens,)` in words."""
    read = row.nonzero()[:, 0].tolist()
    if len(row) == 1:
        return "the query of an attention pool"
    if len(read) == 1:
        return f"token {read[0]}"
    if len(read) == 2:
        return f"tokens {read[0]} and {read[1]}"
    alike = bool(((row[read] - row[read[1]]).abs() < 1e-6)[1:].all())
    first = 1 if alike and abs(float(row[read[0]] - row[read[1]])) > 1e-6 else 0
    beside = f"token {read[0]} beside the " if first else ""
    return f"{beside}mean of {len(read) - first} tokens, {read[first]} to {read[-1]}"
