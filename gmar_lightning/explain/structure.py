"""What decides how a model computes, and what a trial pass through it must hand back."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

# Parameters smaller than this may be gates that training opens later (LayerScale, ReZero, adapters that start at
# zero): the check looks through them with values of ordinary size in their place.
_CLOSED, _OPENED = 1e-3, 0.1


@contextmanager
def attributes_kept(classifier: nn.Module) -> Iterator[None]:
    """What modules note about a pass (maps, losses, routing) stays that of the explained one."""
    plain = [m for m in classifier.modules() if not isinstance(m, torch.jit.ScriptModule)]
    kept = [(module, dict(vars(module)), dict(module._buffers)) for module in plain]
    try:
        yield
    finally:
        for module, attributes, buffers in kept:
            for name in vars(module).keys() - attributes.keys():
                del vars(module)[name]
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)


_gates: ContextVar[bool] = ContextVar("gates", default=False)


@contextmanager
def gates_open(classifier: nn.Module) -> Iterator[None]:
    """Parameters near zero exchanged for others of ordinary size, which the module holds inside the block only."""
    token = _gates.set(True)
    try:
        with gates_open_in(classifier.modules()):
            yield
    finally:
        _gates.reset(token)


def when_gates_are_open() -> bool:
    """Whether this is inside of `gates_open`: whoever puts weights in place there opens theirs as well."""
    return _gates.get()


@contextmanager
def gates_open_in(modules: Iterable[nn.Module], seed: int = 3) -> Iterator[None]:
    """As `gates_open`, in these modules alone, with the values of a seed."""
    generator, held = torch.Generator().manual_seed(seed), []
    try:
        for module in modules:
            if isinstance(module, torch.jit.ScriptModule):
                continue
            for name, parameter in list(module._parameters.items()):
                if parameter is None or not _is_closed(parameter):
                    continue
                noise = _OPENED * torch.randn(parameter.shape, generator=generator)
                held.append((module, name, parameter))
                opened = noise.to(device=parameter.device, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(opened, requires_grad=False)
        yield
    finally:
        for module, name, parameter in reversed(held):
            module._parameters[name] = parameter


def _is_closed(parameter: nn.Parameter) -> bool:
    # Sharded parameters (DTensor, flat ones, freed ones) are left as they are.
    plain = type(parameter) is nn.Parameter and type(parameter.data) is Tensor
    plain = plain and parameter.untyped_storage().nbytes() > 0
    if not plain or not parameter.is_floating_point() or not parameter.numel():
        return False
    return bool(parameter.detach().abs().max() < _CLOSED)


def structure(classifier: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """What decides how tokens flow: modules, their switches and hooks, the shapes of parameters and inputs."""
    modules = tuple(
        (
            name,
            type(module),
            tuple(sorted(module._forward_hooks) + sorted(module._forward_pre_hooks)),
            tuple((key, _identity(value)) for key, value in vars(module).items() if _decides(key, value)),
        )
        for name, module in classifier.named_modules()
    )
    shapes = tuple((name, tuple(p.shape)) for name, p in classifier.named_parameters())
    given = tuple((key, tuple(v.shape) if isinstance(v, Tensor) else type(v)) for key, v in inputs.items())
    return hash((modules, shapes, given))


_SWITCHES = (bool, str, types.FunctionType, types.MethodType, types.BuiltinFunctionType)


def _decides(key: str, value: Any) -> bool:
    # Numbers are left out: a counter would make every step look like another model.
    return key != "training" and isinstance(value, _SWITCHES)


def _identity(value: Any) -> Any:
    return value if isinstance(value, (bool, str)) else hash(value)
