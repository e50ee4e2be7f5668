"""How faithful the maps of a probe are, on a few of its images, beside a random map and plain rollout."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

from gmar_lightning.explain.faithfulness import live_faithfulness
from gmar_lightning.explain.inputs import classifier_of
from gmar_lightning.monitor.measurement import Measurement, on_every_process, share_of
from gmar_lightning.monitor.probe import ProbeBatch
from gmar_lightning.monitor.sharding import gathered

_VALUES = ("insertion_minus_deletion", "average_drop")
FAITHFULNESS_NAMES = tuple(
    f"gmar/faithfulness_{value}{beside}" for value in _VALUES for beside in ("", "_random", "_rollout")
)


def faithfulness_of(
    model: nn.Module,
    probe: ProbeBatch,
    found: Measurement,
    *,
    images: int = 4,
    module: str | None = None,
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, float]:
    """Insertion minus deletion and average drop of a probe's maps, mean over its first images.

    Cost: about 31 forwards per image, shared out between the processes.

    Args:
        model: The model that was probed.
        probe: The probe images.
        found: What the probe found.
        images: How many of them are tried.
        module: Dotted path of the classifier inside `model`.
        precision: Makes the context that the training forward runs under.

    Returns:
        A number for each of `FAITHFULNESS_NAMES`.
    """
    rows = share_of(min(images, len(probe)))

    def tried() -> dict[str, float]:
        with precision():
            return live_faithfulness(
                classifier_of(model, module),
                probe.images[rows],
                torch.from_numpy(found.targets[rows]),
                torch.from_numpy(found.heatmaps[rows]),
            )

    with gathered(model):
        parts = on_every_process(tried)
    prefix = len("gmar/faithfulness_")
    return {name: float(np.mean([part[name[prefix:]] for part in parts])) for name in FAITHFULNESS_NAMES}
