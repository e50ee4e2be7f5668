"""What happens once before the first probe: the images are drawn and checked, the record is opened."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from gmar_lightning.arguments import ConfigurationError
from gmar_lightning.monitor.measurement import ProbeError
from gmar_lightning.monitor.probe import ProbeBatch
from gmar_lightning.monitor.schedule import Every
from gmar_lightning.show.publisher import Publisher
from gmar_lightning.show.render import enlarged, to_uint8_image
from gmar_lightning.trainer import class_names_of, draw_from_validation, normalisation_of, planned_probes


def probe_of(
    trainer: Trainer,
    pl_module: LightningModule,
    given: ProbeBatch | None,
    *,
    num_images: int,
    target: str | int,
    say: Callable[[str], None],
) -> ProbeBatch:
    """The probe images: the user's own, or drawn from the validation set.

    Raises:
        ConfigurationError: When there are none, or no labels where the target needs them.
    """
    try:
        probe = given or draw_from_validation(trainer, pl_module, num_images)
    except (ValueError, ProbeError) as error:
        raise ConfigurationError(f"GMARCallback: {error}") from error
    if probe is None:
        raise ConfigurationError(
            "GMARCallback found no validation dataloader to draw its images from; add one, or pass "
            "probe_batch=(images, labels)"
        )
    if given is None and len(probe) < num_images:
        say(f"GMARCallback: num_images={num_images}, but the validation set has {len(probe)}; using all")
    if target == "label" and probe.labels is None:
        raise ConfigurationError(
            'target="label" needs labels, and the validation batches have none; use target="predicted" or '
            "pass probe_batch=(images, labels)"
        )
    return probe


def open_publisher(
    trainer: Trainer,
    pl_module: LightningModule,
    folder: Path | None,
    probe: ProbeBatch,
    images: Sequence[np.ndarray],
    *,
    schedule: Every,
    names: Sequence[str] | None,
    settings: Mapping[str, Any],
    resumed: bool,
    per_head: bool,
    max_events: int,
) -> Publisher:
    """Start or continue the record, on process zero.

    Args:
        trainer: The trainer; its loggers are published to.
        pl_module: Asked for class names when there are none.
        folder: Where; None keeps the record in memory.
        probe: The probe images.
        images: Those that are drawn.
        schedule: How often a probe is due.
        names: Class names.
        settings: What the record says of the settings.
        resumed: Whether a record in the folder is continued.
        per_head: Whether every head gets a scalar.
        max_events: Pictures of at most so many probes.
    """
    planned = planned_probes(trainer, schedule.unit, schedule.interval)
    return Publisher.open(
        folder,
        probe,
        images,
        trainer.loggers,
        names=names or class_names_of(trainer, pl_module),
        settings={"every": f"{schedule.interval} {schedule.unit}s", **settings},
        resume_at=trainer.global_step if resumed else None,
        per_head=per_head,
        media_every=max(1, math.ceil((planned or 0) / max_events)),
        warn=rank_zero_warn,
    )


def photographs(
    trainer: Trainer,
    pl_module: LightningModule,
    images: Tensor,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> list[np.ndarray]:
    """The probe images as they looked before normalisation, uint8; none where they cannot be drawn."""
    found_mean, found_std = normalisation_of(trainer, pl_module)
    try:
        return [enlarged(to_uint8_image(image, mean or found_mean, std or found_std)) for image in images]
    except Exception as error:
        # One process draws; nothing it meets may keep it from the others.
        rank_zero_warn(f"GMARCallback: the probe images cannot be drawn ({error}); numbers only")
        return []
