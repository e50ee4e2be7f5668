"""How faithful the maps of a probe are, on a few of its images, beside a random map and plain rollout."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from gmar_lightning.explain.faithfulness import faithfulness_per_image, random_maps
from gmar_lightning.explain.inputs import classifier_of
from gmar_lightning.monitor.explanation import Explanation
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


def measure_faithfulness(
    model: nn.Module, probe: ProbeBatch, explanation: Explanation, settings: ProbeSettings
) -> dict[str, float]:
    """Insertion minus deletion and average drop of a probe's maps, mean over its first images.

    Cost: about 29 forwards per image, shared out between the processes. The values are per image, and the
    random map of an image is its own, so the means do not depend on the number of processes.

    Args:
        model: The model that was probed, held whole by every process.
        probe: The probe images.
        explanation: What the probe found; its first maps are tried.
        settings: As the probe was taken.

    Returns:
        A number for each of `FAITHFULNESS`; NaN when no map is finite.
    """
    count = min(_IMAGES, len(probe))
    rows = rows_of_process(count)
    maps = torch.from_numpy(next(iter(explanation.maps.values())))
    plain = torch.from_numpy(explanation.maps["rollout"])
    noise = random_maps((count, *maps.shape[1:]))

    def tried() -> dict[str, np.ndarray]:
        with settings.precision():
            values = faithfulness_per_image(
                classifier_of(model, settings.module),
                probe.images[rows],
                torch.from_numpy(explanation.targets[rows]),
                maps[rows],
                noise[rows],
                rollout=plain[rows],
            )
        return {name: value.cpu().numpy() for name, value in values.items()}

    values = joined(on_every_process(tried), count)
    return {name: _mean(values[name]) for name in FAITHFULNESS}


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)].astype(np.float64)
    return float(known.mean()) if known.size else float("nan")
