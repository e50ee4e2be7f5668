"""What is asked of the model at every probe of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

from gmar_lightning.explain.importance import Norm
from gmar_lightning.explain.inputs import Inputs
from gmar_lightning.explain.output import Output
from gmar_lightning.explain.rollout import Rollout

# "predicted", "label", a class index, or a callable `(output) -> (batch,)`, see `gmar_lightning.targets`.
Target = Literal["predicted", "label"] | int | Callable[[Any], Any]
Precision = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class KnownClasses:
    """What a run says of its classes.

    Attributes:
        counts: How many there are, under the name of who says so.
        firm: Those of the names whose number the scores must match: the module's own metrics and settings.
        output: What the class scores are by the metrics and losses; None where these do not say.
    """

    counts: Mapping[str, int] = field(default_factory=dict)
    firm: frozenset[str] = frozenset()
    output: Output | None = None


@dataclass(frozen=True)
class ProbeSettings:
    """What is asked of the model at a probe, the same for the whole run.

    Attributes:
        target: The explained class, "predicted", "label", or a class index; or a callable on the model's output.
        norm: As for `gmar`.
        rollout: The primary form of the maps; the record keeps the others too.
        residual: As for `gmar`.
        module: Dotted path of the classifier inside the model.
        layer_prefix: In front of the layers' names in events, where several modules are watched.
        inputs: Makes of a batch what the model takes, as for `gmar`.
        micro_batch_size: Images per forward; None takes all at once.
        confirm: Whether newly flagged heads are confirmed by ablation.
        faithfulness_every: When the maps themselves are tested: "ends" (first and last probe), at each multiple of
            this, or None for never.
        drawn: Of how many images, the first ones, the record keeps maps of single heads.
        output: What the class scores are, as for `gmar`; None finds out.
        known: What the run says of the classes.
        precision: Makes the context that the training forward runs under.
    """

    target: Target = "predicted"
    norm: Norm = "l1"
    rollout: Rollout = "gradient"
    residual: float | None = None
    module: str | None = None
    layer_prefix: str = ""
    inputs: Inputs = None
    micro_batch_size: int | None = None
    confirm: bool = True
    faithfulness_every: int | Literal["ends"] | None = None
    drawn: int = 0
    output: Output | None = None
    known: KnownClasses = KnownClasses()
    precision: Precision = nullcontext
