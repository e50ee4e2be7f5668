"""How far the maps of a probe can be relied on, tested on a few of its images.

Insertion minus deletion and average drop beside a random map and plain rollout, and how much the map depends on the
top block's weights: 29 forwards, and one forward with its backward, for each of four images. How much it depends on
the class is asked of all probe images, for one more backward of the probe's own pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gmar_lightning.explain.faithfulness import faithfulness_per_image, random_maps
from gmar_lightning.explain.gmar import GMARResult, gmar
from gmar_lightning.explain.inputs import classifier_of, named_inputs
from gmar_lightning.explain.sanity import (
    SkippedCheckError,
    class_sensitivity,
    randomisation,
    rank_correlation,
)
from gmar_lightning.monitor.explanation import Explanation, targets_of
from gmar_lightning.monitor.probe import ProbeBatch
from gmar_lightning.monitor.processes import joined, on_every_process, rows_of_process
from gmar_lightning.monitor.settings import ProbeSettings

# Images that are tried: 29 forwards each.
_IMAGES = 4

FAITHFULNESS = tuple(
    f"{value}{beside}"
    for value in ("insertion_minus_deletion", "average_drop")
    for beside in ("", "_random", "_rollout")
)
# Rank correlations that a map should not have: with the runner-up's map, and with that of shuffled weights.
SANITY = ("class_sensitivity", "randomisation")


def measure_faithfulness(
    model: nn.Module,
    probe: ProbeBatch,
    explanation: Explanation,
    settings: ProbeSettings,
    say: Callable[[str, str], None],
) -> dict[str, float]:
    """Faithfulness and randomisation of a probe's maps, mean over its first images; class sensitivity over all.

    Without the runner-up's maps in the explanation, those of the first images are made here. The images are shared
    out between the processes. The values are per image, and the random map of an image is its own, so the means do
    not depend on the number of processes.

    Args:
        model: The model that was probed, held whole by every process.
        probe: The probe images.
        explanation: What the probe found; its first maps are tried.
        settings: As the probe was taken.
        say: Told why a check was skipped, with a key for the kind of reason.

    Returns:
        A number for each of `FAITHFULNESS` and `SANITY`; NaN when no map is finite, and for a check that was skipped.
    """
    count = min(_IMAGES, len(probe))
    rows = rows_of_process(count)
    images = named_inputs(probe.part(rows), settings.inputs)
    maps = torch.from_numpy(next(iter(explanation.maps.values())))
    plain = torch.from_numpy(explanation.maps["rollout"])
    noise = random_maps((count, *maps.shape[1:]))
    of_class = None if explanation.targets is None else torch.from_numpy(explanation.targets[rows])
    targets: Any = targets_of(probe, settings.target, rows) if of_class is None else of_class

    def tried() -> dict[str, np.ndarray]:
        with settings.precision():
            values = faithfulness_per_image(
                classifier_of(model, settings.module),
                images,
                targets,
                maps[rows],
                noise[rows],
                rollout=plain[rows],
                output=explanation.output,
            )
        return {name: value.cpu().numpy() for name, value in values.items()}

    def other_class() -> Tensor:
        if of_class is None or explanation.logits is None:
            raise SkippedCheckError("a callable says what is explained, so there is no runner-up class")
        logits = torch.from_numpy(explanation.logits[rows])
        return class_sensitivity(model, images, maps[rows], of_class, logits, _explain(settings))

    def checked() -> dict[str, np.ndarray]:
        tests: dict[str, Callable[[], Tensor]] = {
            "randomisation": lambda: randomisation(
                model,
                images,
                maps[rows],
                targets,
                _explain(settings),
                layer=explanation.layers[-1],
                module=settings.module,
            ),
        }
        if explanation.runner_up is None:
            tests["class_sensitivity"] = other_class
        return {name: _or_skipped(test, name, len(rows), settings, say) for name, test in tests.items()}

    values = {**joined(on_every_process(tried), count), **joined(on_every_process(checked), count)}
    if explanation.runner_up is not None:
        values["class_sensitivity"] = rank_correlation(maps, torch.from_numpy(explanation.runner_up)).numpy()
    return {name: _mean(values[name]) for name in (*FAITHFULNESS, *SANITY)}


def _explain(settings: ProbeSettings) -> Callable[..., GMARResult]:
    """`gmar` as the maps of the primary form were made."""
    return functools.partial(
        gmar,
        norm=settings.norm,
        rollout=settings.rollout,
        residual=settings.residual,
        module=settings.module,
        micro_batch_size=settings.micro_batch_size,
    )


def _or_skipped(
    test: Callable[[], Tensor],
    name: str,
    count: int,
    settings: ProbeSettings,
    say: Callable[[str, str], None],
) -> np.ndarray:
    try:
        with settings.precision():
            return test().cpu().numpy()
    except SkippedCheckError as reason:
        say(f"GMARCallback: {name} of the maps is not measured: {reason}", f"skipped {name}")
        return np.full(count, np.nan)


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)].astype(np.float64)
    return float(known.mean()) if known.size else float("nan")
