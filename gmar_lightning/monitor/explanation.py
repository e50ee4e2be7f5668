"""The probe images explained by all processes together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from gmar_lightning.explain.gmar import GMARResult, gmar
from gmar_lightning.explain.inputs import Goal, goal_of
from gmar_lightning.explain.output import Output, probabilities
from gmar_lightning.explain.rollout import Rollout
from gmar_lightning.monitor.packing import signal_of
from gmar_lightning.monitor.probe import ProbeBatch
from gmar_lightning.monitor.processes import ProbeError, joined, on_every_process, rows_of_process
from gmar_lightning.monitor.settings import ProbeSettings, Target


@dataclass(frozen=True, eq=False)
class Explanation:
    """What `gmar` found of every probe image, from all processes, in the order of the images.

    Attributes:
        maps: Form of the rollout to `(images, grid_h, grid_w)`, the primary form first.
        importance: `(images, layers, heads)`.
        others: Every other signal per head, name to `(images, layers, heads)`.
        logits: `(images, classes)`; None when a callable says what is explained.
        targets: `(images,)`, the classes explained; None likewise.
        scores: `(images,)`, the explained scalars.
        layers: Module path of each layer.
        scope: What the maps cover, as in `GMARResult`.
        head_maps: `(images, layers, heads, grid_h, grid_w)`; None unless asked for.
        runner_up: Maps of the primary form for the runner-up class; None unless asked for and possible.
        micro_batch_size: Images per forward.
        out_of_memory: Whether that was halved because memory ran out.
        output: What the logits are; None when it is not known.
    """

    maps: Mapping[str, np.ndarray]
    importance: np.ndarray
    others: Mapping[str, np.ndarray]
    logits: np.ndarray | None
    targets: np.ndarray | None
    scores: np.ndarray
    layers: tuple[str, ...]
    scope: str = "whole"
    head_maps: np.ndarray | None = None
    runner_up: np.ndarray | None = None
    micro_batch_size: int = 1
    out_of_memory: bool = False
    output: Output | None = None

    @property
    def probabilities(self) -> np.ndarray | None:
        """How probable each class is, `(images, classes)`; None without logits, and when it is not known."""
        if self.logits is None:
            return None
        chances = probabilities(torch.from_numpy(self.logits), self.output)
        return None if chances is None else chances.numpy()

    def signals(self) -> dict[str, np.ndarray]:
        """Name to table `(layers, heads)`, each image's values combined as `packing.SIGNALS` says."""
        per_image = {"importance": self.importance, **self.others}
        if "contribution" in per_image:
            per_image["contribution_signed"] = per_image["contribution"]
        return {
            name: _over_images(values.astype(np.float64), signal_of(name).over_images)
            for name, values in per_image.items()
        }


def explain_together(
    model: nn.Module,
    probe: ProbeBatch,
    settings: ProbeSettings,
    explain: Callable[..., GMARResult] = gmar,
    runner_up: bool = False,
) -> Explanation:
    """Explain the probe images on all processes together.

    Out of memory, all processes retry with half the micro-batch until it is one image.

    Args:
        model: The module to explain, held whole by every process (`processes.gathered`).
        probe: The images.
        settings: The form of the explanation.
        explain: `gmar`, or what stands for it.
        runner_up: Also explain the runner-up class, for one more backward.

    Returns:
        The explanation, the same on every process.

    Raises:
        UnsupportedModelError: Where `gmar` does.
        ProbeError: When the probe failed on this or another process.
    """
    rows = rows_of_process(len(probe))
    images, targets = probe.part(rows), targets_of(probe, settings.target, rows)
    size, exhausted = min(settings.micro_batch_size or len(rows), len(rows)), False
    # All forms come from the same pass, so the record keeps them all.
    others = [form for form in get_args(Rollout) if form != settings.rollout]

    def explained() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        with settings.precision():
            result = explain(
                model,
                images,
                targets,
                norm=settings.norm,
                rollout=(settings.rollout, *others),
                residual=settings.residual,
                module=settings.module,
                inputs=settings.inputs,
                micro_batch_size=size,
                signals=True,
                head_maps=settings.drawn > 0,
                output=settings.output,
                runner_up=runner_up,
            )
        return _per_image(result), {name: getattr(result, name) for name in ("layers", "scope", "output")}

    while True:
        try:
            parts = on_every_process(explained)
        except MemoryError:
            if size == 1:
                raise ProbeError("out of memory with one image at a time") from None
            size, exhausted = -(-size // 2), True
        else:
            found = _together([part for part, _ in parts], len(probe), parts[0][1], size, exhausted)
            return replace(found, head_maps=_drawn(found.head_maps, settings.drawn))
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def _drawn(head_maps: np.ndarray | None, count: int) -> np.ndarray | None:
    # Relevance per token of a sequence is no picture.
    return head_maps[:count] if head_maps is not None and head_maps.ndim == 5 else None


def targets_of(probe: ProbeBatch, target: Target, rows: list[int]) -> Goal:
    """What is explained of some of the probe images.

    Raises:
        ProbeError: There are no labels, and the target needs them.
    """
    if callable(target):
        return goal_of(target, rows)
    if target == "predicted":
        return None
    if target == "label":
        if probe.labels is None:
            raise ProbeError('target="label" needs labels, and the probe batch has none')
        return probe.labels[rows]
    return torch.full((len(rows),), int(target))


def _per_image(result: GMARResult) -> dict[str, np.ndarray]:
    """Everything in a result that has a row per image, under flat names."""
    parts = {
        "importance": result.importance,
        "scores": result.score,
        "signal contribution": result.contribution,
        **{f"signal {name}": values for name, values in result.signals.items()},
        **{f"map {form}": maps for form, maps in result.maps.items()},
    }
    for name in ("logits", "targets", "head_maps", "runner_up"):
        value = getattr(result, name)
        if value is not None:
            parts[name] = value
    return {name: _as_array(value) for name, value in parts.items()}


def _as_array(value: Tensor) -> np.ndarray:
    # NumPy knows no bfloat16.
    return (value.float() if value.dtype in (torch.bfloat16, torch.float16) else value).cpu().numpy()


def _together(
    parts: list[dict[str, np.ndarray]], count: int, alike: dict[str, Any], size: int, exhausted: bool
) -> Explanation:
    whole = joined(parts, count)

    def named(kind: str) -> dict[str, np.ndarray]:
        return {name.removeprefix(kind): value for name, value in whole.items() if name.startswith(kind)}

    return Explanation(
        maps=named("map "),
        importance=whole["importance"],
        others=named("signal "),
        logits=whole.get("logits"),
        targets=whole.get("targets"),
        scores=whole["scores"],
        **alike,
        head_maps=whole.get("head_maps"),
        runner_up=whole.get("runner_up"),
        micro_batch_size=size,
        out_of_memory=exhausted,
    )


def _over_images(values: np.ndarray, how: str) -> np.ndarray:
    """One table `(layers, heads)` from `(images, layers, heads)`."""
    if how == "max":
        return values.max(0)
    if how == "most frequent":
        return _most_frequent(values)
    return (np.abs(values) if how == "mean of absolutes" else values).mean(0)


def _most_frequent(values: np.ndarray) -> np.ndarray:
    """The most frequent value over the images, the smallest of equally frequent ones; NaN stays NaN."""
    counts = (values[:, None] == values[None]).sum(1)  # (images, layers, heads): how often each value occurs
    # The smallest index wins a tie, so that the answer does not depend on the order of the images.
    best = np.where(counts == counts.max(0), values, np.inf).min(0)
    return np.where(np.isnan(values).any(0), np.nan, best)
