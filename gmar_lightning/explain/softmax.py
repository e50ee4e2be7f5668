"""Attention written by hand: a product of two activations, a softmax over it, a product with values.

What fused kernels hide, code of this kind shows: the map itself is a tensor. It is followed from the softmax through
whatever keeps it a map (dropout, masks, renormalisation, mixing of heads) up to the matrix product that takes it to
the values. That last tensor is the map that multiplies `V`, so `dO V^T` is its gradient, exactly as for a fused call.
"""

from __future__ import annotations

import string
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_PRODUCTS = frozenset({"matmul", "bmm", "baddbmm", "einsum", "cdist"})
# What may stand between a product and its softmax, or between a softmax and the values, without ending either.
_MIXING = frozenset({"linear", "conv1d", "conv2d", "batch_norm", "layer_norm", "instance_norm", "group_norm"})
_PARTS = frozenset({"getitem", "narrow", "split", "chunk", "unbind", "index_select", "cat", "pad", "slice"})


@dataclass(frozen=True, eq=False)
class HandProduct:
    """A map times values, as `(..., queries, keys) @ (..., keys, dim)`.

    Attributes:
        weights: The map, attached.
        values: The values, attached.
        compute: Runs the product as it was written; the result as `(..., queries, dim)`.
        restored: Gives a result the shape that the model goes on with.
        where: The entry of the softmax among those that were not multiplied with anything yet.
    """

    weights: Tensor
    values: Tensor
    compute: Callable[[], Tensor]
    restored: Callable[[Tensor], Tensor]
    where: str


class _Marks:
    """Tensors that carry a mark while they live; nothing is kept alive."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], Any]] = {}

    def put(self, tensor: Tensor, mark: Any) -> None:
        self._known[id(tensor)] = (weakref.ref(tensor), mark)

    def get(self, tensor: Any) -> Any:
        reference, mark = self._known.get(id(tensor), (None, None))
        # An address is used again when its tensor is gone.
        return mark if reference is not None and reference() is tensor else None


class HandWritten:
    """Follows scores and maps through one forward pass.

    Args:
        current: Invocation numbers of the modules that run, outermost first, each with whether it has parameters.
    """

    def __init__(self, current: Callable[[], list[tuple[int, bool]]]) -> None:
        self._current = current
        self._scores, self._maps = _Marks(), _Marks()

    def product(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> HandProduct | None:
        """The map-values product that a function call is; None for everything else."""
        name = name_of(func)
        if name not in ("matmul", "bmm", "einsum") or kwargs.get("out") is not None:
            return None
        operands = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if name == "einsum" and len(args) == 2 and isinstance(args[1], (list, tuple)):
            operands = list(args[1])
        marked = [index for index, operand in enumerate(operands) if self._maps.get(operand) is not None]
        if len(operands) != 2 or len(marked) != 1:
            return None
        run = lambda: func(*args, **kwargs)  # noqa: E731
        weights, values = operands[marked[0]], operands[1 - marked[0]]
        # A matrix of parameters, (heads, heads), mixes maps; values come with the batch in front.
        if values.ndim < 3 or weights.ndim < 3:
            return None
        where = self._maps.get(weights)
        if name == "einsum":
            return _einsum(args[0], weights, values, marked[0], run, where)
        if marked[0] == 0:
            shape = torch.broadcast_shapes(weights.shape[:-2], values.shape[:-2])
            weights, values = (
                weights.expand(*shape, *weights.shape[-2:]),
                values.expand(*shape, *values.shape[-2:]),
            )
            return HandProduct(weights, values, run, lambda output: output, where)
        shape = torch.broadcast_shapes(weights.shape[:-2], values.shape[:-2])
        weights, values = (
            weights.expand(*shape, *weights.shape[-2:]),
            values.expand(*shape, *values.shape[-2:]),
        )
        return HandProduct(weights.mT, values.mT, lambda: run().mT, lambda output: output.mT, where)

    def saw(self, func: Any, operands: tuple[Any, ...], result: Any, is_softmax: bool, where: str) -> bool:
        """A function returned `result`; whether it was the softmax of scores.

        Args:
            func: The function.
            operands: What it was given; lists of tensors count as tensors.
            result: A tensor or a tuple of them.
            is_softmax: Whether the function is a softmax.
            where: The running module, for the map's later use.
        """
        name = name_of(func)
        given = [x for item in operands for x in (item if isinstance(item, (list, tuple)) else (item,))]
        given = [x for x in given if isinstance(x, Tensor)]
        if is_softmax:
            if isinstance(result, Tensor) and any(self._live(x) for x in given):
                self._maps.put(result, where)
                return True
            return False
        if self._is_product(name, given) and isinstance(result, Tensor):
            self._scores.put(result, self._frame())
            return False
        self._pass_on(name, given, result)
        return False

    def _is_product(self, name: str, given: list[Tensor]) -> bool:
        """Whether two activations are multiplied; a matrix of parameters has two axes."""
        activations = sum(x.ndim >= 3 for x in given)
        return name in _PRODUCTS and activations >= 2 and not any(self._maps.get(x) for x in given)

    def _pass_on(self, name: str, given: list[Tensor], result: Any) -> None:
        results = result if isinstance(result, (tuple, list)) else (result,)
        for marks in (self._scores, self._maps):
            carrier = next((x for x in given if marks.get(x) is not None), None)
            if carrier is None:
                continue
            for item in results:
                if isinstance(item, Tensor) and item.ndim >= 2:
                    same = item.numel() == carrier.numel() or name in _MIXING or name in _PARTS
                    if same or name in _PRODUCTS:
                        marks.put(item, marks.get(carrier))

    def _live(self, tensor: Tensor) -> bool:
        """Whether a tensor holds scores whose module still runs: a residual stream is not made of scores."""
        frame = self._scores.get(tensor)
        return frame is not None and (frame == -1 or frame in [number for number, _ in self._current()])

    def _frame(self) -> int:
        # A wrapper without parameters around a product is no attention module: its caller is.
        running = [number for number, has_parameters in self._current() if has_parameters]
        return running[-1] if running else -1


def name_of(func: Any) -> str:
    """The plain name of a torch function: `Tensor.__matmul__`, `torch.matmul` and `@` are one."""
    return (
        getattr(func, "__name__", "")
        .strip("_")
        .removesuffix("_")
        .removeprefix("r" if _reversed(func) else "")
    )


def _reversed(func: Any) -> bool:
    return getattr(func, "__name__", "") in ("__rmatmul__", "__rmul__", "__radd__", "__rsub__", "__rdiv__")


def _einsum(
    equation: Any, weights: Tensor, values: Tensor, position: int, run: Callable[[], Tensor], where: str
) -> HandProduct | None:
    """An einsum of a map and values with its axes sorted out; None when it only mixes maps."""
    labels = _labels(equation, (weights, values) if position == 0 else (values, weights))
    if labels is None:
        return None
    of_map, of_values, result = labels[position], labels[1 - position], labels[2]
    keys = [x for x in of_map if x in of_values and x not in result]
    dims = [x for x in of_values if x in result and x not in of_map]
    asking = [x for x in of_map if x in result and x not in of_values]
    if len(keys) != 1 or len(dims) != 1 or not asking:
        return None
    query = asking[-1]
    lead = [x for x in of_map if x not in (keys[0], query)]
    if sorted(result) != sorted([*lead, query, dims[0]]):
        return None
    sizes = dict(zip(of_map, weights.shape, strict=True))
    missing = [x for x in lead if x not in of_values]
    spread = values[(None,) * len(missing)]
    order = [*missing, *of_values]
    spread = spread.permute([order.index(x) for x in (*lead, keys[0], dims[0])])
    spread = spread.expand(*(sizes[x] for x in lead), *spread.shape[-2:])
    forwards = [result.index(x) for x in (*lead, query, dims[0])]
    backwards = [[*lead, query, dims[0]].index(x) for x in result]
    return HandProduct(
        weights.permute([of_map.index(x) for x in (*lead, query, keys[0])]),
        spread,
        lambda: run().permute(forwards),
        lambda output: output.permute(backwards),
        where,
    )


def _labels(equation: Any, operands: tuple[Tensor, Tensor]) -> tuple[str, str, str] | None:
    """Axis labels of two operands and the result, with `...` written out."""
    if not isinstance(equation, str) or "->" not in equation:
        return None
    given, result = equation.replace(" ", "").split("->")
    parts = given.split(",")
    if len(parts) != 2:
        return None
    free = [letter for letter in string.ascii_letters if letter not in equation]
    counts = [t.ndim - len(part.replace("...", "")) for part, t in zip(parts, operands, strict=True)]
    # The axes that `...` stands for are aligned at the right, as in broadcasting.
    hidden = free[: max([0, *(count for part, count in zip(parts, counts, strict=True) if "..." in part)])]
    out = [
        part.replace("...", "".join(hidden[len(hidden) - n :])) for part, n in zip(parts, counts, strict=True)
    ]
    if any(len(part) != t.ndim or len(set(part)) != len(part) for part, t in zip(out, operands, strict=True)):
        return None
    return out[0], out[1], result.replace("...", "".join(hidden))
