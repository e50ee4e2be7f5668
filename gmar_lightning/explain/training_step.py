"""Head importance read off an ordinary training step: no extra forward, no extra backward.

Each attention call of the step runs as it would, with the very arguments it was given; a gradient hook on its
output then sees `dL/dO` as the backward pass brings it along. With `O = A V` that is enough for the L2 norm of the
gradient of the map (two Gram matrices, `||dO V^T||_F^2 = sum((dO^T dO) * (V^T V))`) and for the contribution
`sum(dO * O)`. What is read is the gradient of the *loss*, on the *training* batch: not comparable with a probe's,
which explains a logit on fixed validation images.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.overrides import TorchFunctionMode

from gmar_lightning.explain.errors import UnsupportedModelError
from gmar_lightning.explain.intercept import at_least_float32, one_per_head

_ATTENTION = F.scaled_dot_product_attention


@dataclass(frozen=True, eq=False)
class StepSignals:
    """What one training step said of each head; layers with fewer heads are padded with NaN.

    Attributes:
        importance: `(layers, heads)`, L2 norm of the gradient of an image's loss with respect to the head's attention
            map, mean over the images of the batch.
        contribution: `(layers, heads)`, mean over images of `|sum dO * O|`.
        layers: Module path of each attention layer, in forward order.
        rows: Batch rows that each layer's means are over.
        finite: Whether every number is; not so where a loss scaled for half precision overflowed.
    """

    importance: Tensor
    contribution: Tensor
    layers: tuple[str, ...]
    rows: tuple[int, ...]
    finite: bool = True


class StepReader:
    """Collects the signals of the training steps that run inside `watching`.

    Args:
        model: Its module paths name the layers.
        inside: Leave out attention that runs outside of all its modules, as when it is a part of what is trained.

    Raises:
        UnsupportedModelError: When the model is compiled: compiled code calls no function that could be watched, and
            replacing one would compile it anew.
    """

    def __init__(self, model: nn.Module, inside: bool = False) -> None:
        compiled = next((name for name, part in model.named_modules() if _is_compiled(part)), None)
        if compiled is not None:
            raise UnsupportedModelError(
                f'{compiled or "the model"} is compiled; read="step" needs eager code. Use read="probe", which runs '
                "compiled models eagerly for the probe alone."
            )
        self._names = {part: name for name, part in model.named_modules()}
        self._elsewhere = None if inside else ""
        self._running: list[nn.Module] = []
        self._thread = threading.get_ident()
        self._order: dict[str, int] = {}
        self._sums: dict[str, tuple[Tensor, Tensor, int]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the forward and backward passes inside the block; what they compute stays bit for bit the same."""
        original = F.scaled_dot_product_attention
        enter = module_hooks.register_module_forward_pre_hook(self._enter)
        leave = module_hooks.register_module_forward_hook(self._leave, always_call=True)
        # By name for what `nn.MultiheadAttention` calls and what a checkpoint recomputes during the backward pass
        # (no function mode is active there), by mode for modules that imported the function itself.
        F.scaled_dot_product_attention = self._attention
        try:
            with _Mode(self):
                yield
        finally:
            F.scaled_dot_product_attention = original
            enter.remove()
            leave.remove()
            self._running.clear()

    def signals(self, factor: float = 1.0) -> StepSignals | None:
        """What was seen since the last call, None when no gradient reached an attention layer; forgets it.

        Args:
            factor: Undoes what scaled the loss: the accumulation count, and one over the scale of mixed precision.
        """
        sums, self._sums = self._sums, {}
        layers = tuple(sorted(sums, key=self._order.__getitem__))
        if not layers:
            return None
        widest = max(sums[layer][0].shape[-1] for layer in layers)

        def stacked(totals: list[Tensor]) -> Tensor:
            counts = [sums[layer][2] for layer in layers]
            means = [total / count for total, count in zip(totals, counts, strict=True)]
            padded = [F.pad(row, (0, widest - row.shape[-1]), value=torch.nan) for row in means]
            return torch.stack(padded).mul_(factor)

        norms, parts = [sums[layer][0] for layer in layers], [sums[layer][1] for layer in layers]
        finite = bool(torch.cat(norms).isfinite().all())  # before layers are padded with NaN
        rows = tuple(sums[layer][2] for layer in layers)
        return StepSignals(stacked(norms), stacked(parts), layers, rows, finite)

    def _attention(self, *args: Any, **kwargs: Any) -> Tensor:
        output = _ATTENTION(*args, **kwargs)
        if threading.get_ident() != self._thread and not _recomputing():
            return output
        name = self._name()
        if name is None:
            return output
        self._order.setdefault(name, len(self._order))
        # Under reentrant checkpointing the first forward has no graph; its recomputation comes by here again. What a
        # non-reentrant checkpoint recomputes gets a hook that never fires: gradients flow through the first graph.
        if output.requires_grad and output.ndim == 4:
            value = args[2] if len(args) > 2 else kwargs["value"]
            self._attach(name, output, value.detach())
        return output

    def _attach(self, name: str, output: Tensor, value: Tensor) -> None:
        attended = output.detach()

        def read(grad: Tensor) -> None:
            # A backward pass may run under the step's autocast, which would do these products in half precision.
            with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
                grad32, heads = at_least_float32(grad), grad.shape[1]
                values = at_least_float32(one_per_head(value, heads))
                gram = (grad32.mT @ grad32) * (values.mT @ values)
                # The loss is a mean over the batch; times the batch, a row is the gradient of its image's loss.
                batch = len(grad)
                norm = gram.sum((-2, -1)).clamp_min(0).sqrt().sum(0) * batch
                part = (grad32 * at_least_float32(attended)).sum((-2, -1)).abs().sum(0) * batch
                before = self._sums.get(name)
                if before is not None:
                    norm, part, batch = norm + before[0], part + before[1], batch + before[2]
                self._sums[name] = norm, part, batch

        output.register_hook(read)

    def _enter(self, module: nn.Module, args: Any) -> None:
        if threading.get_ident() == self._thread or _recomputing():
            self._running.append(module)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        while self._running and self._running.pop() is not module:
            pass  # a module left by an exception

    def _name(self) -> str | None:
        running = (self._names[part] for part in reversed(self._running) if part in self._names)
        return next(running, self._elsewhere)


class _Mode(TorchFunctionMode):
    """Sees calls of the attention function under any name."""

    def __init__(self, reader: StepReader) -> None:
        super().__init__()
        self._reader = reader

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _ATTENTION:
            return self._reader._attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _recomputing() -> bool:
    # Private, without a public equal: the number of the backward pass that this thread is in, -1 outside of any.
    return torch._C._current_graph_task_id() != -1


def _is_compiled(module: nn.Module) -> bool:
    # `torch.compile(module)` wraps, `module.compile()` sets this private attribute instead.
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def over_processes(parts: Sequence[StepSignals | None]) -> StepSignals | None:
    """One answer from what each process saw of its part of the batch; None when nobody saw anything.

    Raises:
        ValueError: When processes saw different layers.
    """
    seen = [part for part in parts if part is not None]
    if not seen:
        return None
    layers = seen[0].layers
    if any(part.layers != layers for part in seen):
        raise ValueError(
            f"the step ran other layers on some processes: {sorted({part.layers for part in seen})}"
        )
    rows = torch.tensor([part.rows for part in seen], dtype=torch.float64)  # (processes, layers)
    weights = (rows / rows.sum(0)).unsqueeze(-1)

    def mean(tables: list[Tensor]) -> Tensor:
        return (torch.stack(tables) * weights).sum(0)

    return StepSignals(
        mean([part.importance for part in seen]),
        mean([part.contribution for part in seen]),
        layers,
        tuple(int(count) for count in rows.sum(0)),
        all(part.finite for part in seen),
    )
