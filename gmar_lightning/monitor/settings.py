"""What is asked of the model at every probe of a run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

from gmar_lightning.explain.importance import Norm
from gmar_lightning.explain.rollout import Rollout

Precision = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class ProbeSettings:
    """What is asked of the model at a probe, the same for the whole run.

    Attributes:
        target: The explained class: "predicted", "label", or a class index.
        norm: As for `gmar`.
        rollout: The primary form of the maps; the record keeps the others too.
        residual: As for `gmar`.
        module: Dotted path of the classifier inside the model.
        micro_batch_size: Images per forward; None takes all at once.
        confirm: Whether newly flagged heads are confirmed by ablation.
        faithfulness_every: Measure how faithful the maps are at each multiple of this; None never does.
        precision: Makes the context that the training forward runs under.
    """

    target: Literal["predicted", "label"] | int = "predicted"
    norm: Norm = "l1"
    rollout: Rollout = "gradient"
    residual: float | None = None
    module: str | None = None
    micro_batch_size: int | None = None
    confirm: bool = True
    faithfulness_every: int | None = None
    precision: Precision = nullcontext
