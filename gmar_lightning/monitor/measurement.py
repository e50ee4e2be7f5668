"""One probe: every process explains its share, all agree on the outcome, the results are put together."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from gmar_lightning.explain.errors import UnsupportedModelError
from gmar_lightning.explain.gmar import GMARResult, gmar
from gmar_lightning.monitor.probe import ProbeBatch
from gmar_lightning.monitor.sharding import gathered


class ProbeError(RuntimeError):
    """A probe failed on another process; says where and why.

    Attributes:
        refused: Whether the model or the arguments are at fault, rather than the moment.
    """

    def __init__(self, message: str, refused: bool = False) -> None:
        super().__init__(message)
        self.refused = refused


def refused(error: Exception) -> bool:
    """Whether the model or the arguments are at fault, rather than the moment; the same on all processes."""
    return isinstance(error, (UnsupportedModelError, ValueError)) or getattr(error, "refused", False)


@dataclass(frozen=True, eq=False)
class Measurement:
    """What one probe found, gathered from all processes, as NumPy arrays.

    Attributes:
        heatmaps: `(images, grid_h, grid_w)`.
        importance: `(layers, heads)`, raw norms, mean over images.
        entropy: `(layers, heads)`, mean over images; so are `distance` and `output_norm`.
        logits: `(images, classes)`.
        targets: `(images,)`, the classes explained.
        layers: Module path of each layer.
        micro_batch_size: Images per forward.
        out_of_memory: Whether that was halved because memory ran out.
    """

    heatmaps: np.ndarray
    importance: np.ndarray
    entropy: np.ndarray
    distance: np.ndarray
    output_norm: np.ndarray
    logits: np.ndarray
    targets: np.ndarray
    layers: tuple[str, ...] = field(default=())
    micro_batch_size: int = 1
    out_of_memory: bool = False

    @property
    def shares(self) -> np.ndarray:
        """`(layers, heads)`, importance as a share of its layer; equal shares where a layer has none."""
        heads = np.isfinite(self.importance)
        total = np.where(heads, self.importance, 0).sum(-1, keepdims=True)
        with np.errstate(invalid="ignore", divide="ignore"):
            fair = np.where(heads, 1 / heads.sum(-1, keepdims=True), np.nan)
            return np.where(total > 0, self.importance / total, fair)

    @property
    def probabilities(self) -> np.ndarray:
        """`(images, classes)`, softmax of the logits."""
        return torch.from_numpy(self.logits).softmax(-1).numpy()


def measure(
    model: nn.Module,
    probe: ProbeBatch,
    explain: Callable[..., GMARResult] = gmar,
    *,
    target: Literal["predicted", "label"] | int = "predicted",
    micro_batch_size: int | None = None,
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Measurement:
    """Explain the probe images on all processes together.

    Each process takes every world-size-th image, so the numbers do not depend on the number of processes.
    Out of memory, all processes retry with half the micro-batch until it is one image.

    Args:
        model: The module to explain; on a sharded model every process must call.
        probe: The images.
        explain: `gmar`, with the form of the explanation already filled in.
        target: Which class is explained: the predicted one, the label, or a class index.
        micro_batch_size: Images per forward; None takes the whole share at once.
        precision: Makes the context that the training forward runs under.

    Returns:
        The measurement, the same on every process.

    Raises:
        UnsupportedModelError: Where `gmar` does.
        ProbeError: When the probe failed on this or another process.
    """
    rows = share_of(len(probe))
    images = probe.images[rows]
    targets = _targets(probe, target, rows)
    size, exhausted = min(micro_batch_size or len(rows), len(rows)), False

    def explained() -> dict[str, Any]:
        with precision():
            return _on_cpu(explain(model, images, targets, micro_batch_size=size, signals=True))

    while True:
        try:
            with gathered(model):
                parts = on_every_process(explained)
        except MemoryError:
            if size == 1:
                raise ProbeError("out of memory with one image at a time") from None
            size, exhausted = -(-size // 2), True
        else:
            return replace(_put_together(parts, len(probe)), micro_batch_size=size, out_of_memory=exhausted)
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def agreed_probe(draw: Callable[[], ProbeBatch]) -> ProbeBatch:
    """Draw the probe images on every process; where they differ, all take those of the first.

    They differ when a data set gives each process its own part.

    Raises:
        ProbeError: When the drawing failed on another process; a failure here is raised as it is.
    """
    drawn: list[ProbeBatch] = []

    def fingerprint() -> str:
        drawn.append(draw())
        return drawn[0].fingerprint

    if len(set(on_every_process(fingerprint))) > 1:
        dist.broadcast_object_list(drawn, src=0)
    return drawn[0]


def on_every_process(work: Callable[[], Any]) -> list[Any]:
    """Run `work` on every process and hand everyone all results, or the same failure.

    Nobody leaves before all have reported, so a failure on one process cannot leave the others waiting.
    (A model that communicates in its own forward can still wait for a process that failed in it.)

    Raises:
        MemoryError: When some process ran out of memory.
        ProbeError: When some process failed elsewhere; a failure here is raised as it is.
    """
    own: Exception | None = None
    outcome: tuple[str, Any]
    try:
        outcome = ("done", work())
    except Exception as error:
        if _is_out_of_memory(error):
            # Not kept: its traceback holds the tensors that filled the memory.
            outcome = ("memory", None)
        else:
            own = error
            outcome = ("refused" if refused(error) else "failed", f"{type(error).__name__}: {error}")
    try:
        outcomes = _gathered(outcome)
        if own is not None:
            raise own
        for rank, (kind, cause) in enumerate(outcomes):
            if kind in ("failed", "refused"):
                raise ProbeError(f"on process {rank}: {cause}", refused=kind == "refused")
        if any(kind == "memory" for kind, _ in outcomes):
            raise MemoryError
        return [result for _, result in outcomes]
    finally:
        own = None  # or the error and this frame would keep each other, and the activations, alive


def share_of(count: int) -> list[int]:
    """Which of `count` probe images this process explains, padded so that every process has equally many.

    Equal shares keep the processes in step, and make what they gather one rectangular array.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if _many() else (0, 1)
    longest = -(-count // world)
    return [min(index, count - 1) for index in range(rank, longest * world, world)]


def _gathered(outcome: tuple[str, Any]) -> list[tuple[str, Any]]:
    if not _many():
        return [outcome]
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome)
    return outcomes


def _many() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _is_out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
    )


def _targets(probe: ProbeBatch, target: str | int, rows: list[int]) -> Tensor | None:
    if target == "predicted":
        return None
    if target == "label":
        if probe.labels is None:
            raise ProbeError('target="label" needs labels, and the probe batch has none')
        return probe.labels[rows]
    return torch.full((len(rows),), int(target))


def _on_cpu(result: GMARResult) -> dict[str, Any]:
    parts: dict[str, Any] = {item.name: getattr(result, item.name) for item in fields(result)}
    parts = {**parts, **parts.pop("signals"), "maps": None}
    return {name: _as_array(value) if isinstance(value, Tensor) else value for name, value in parts.items()}


def _as_array(value: Tensor) -> np.ndarray:
    # NumPy knows no bfloat16.
    return (value.float() if value.dtype in (torch.bfloat16, torch.float16) else value).cpu().numpy()


def _put_together(parts: list[dict[str, Any]], count: int) -> Measurement:
    def interleaved(name: str) -> np.ndarray:
        # Process r of w explained images r, r + w, ...; what padded the last shares falls off the end.
        return np.stack([part[name] for part in parts], 1).reshape(-1, *parts[0][name].shape[1:])[:count]

    def mean(name: str) -> np.ndarray:
        return interleaved(name).astype(np.float64).mean(0)

    return Measurement(
        heatmaps=interleaved("heatmaps"),
        importance=mean("importance"),
        entropy=mean("entropy"),
        distance=mean("distance"),
        output_norm=mean("output_norm"),
        logits=interleaved("logits"),
        targets=interleaved("targets"),
        layers=parts[0]["layers"],
    )
