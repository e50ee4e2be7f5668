"""What a user's forward writes into its own module: counters, lists of features, reassigned buffers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# Parameters and submodules are nobody's to change in a forward; sharded training does change them.
_NOT_STATE = ("_parameters", "_modules", "training")


@contextmanager
def attributes_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put the attributes and buffers of modules back as they were found, whatever a forward assigned.

    Covers attributes set, added or deleted, lists, dictionaries and sets that grew or shrank, and tensors
    changed in place. Not covered: what lies inside other objects.

    Args:
        modules: The modules, each taken by itself.
    """
    kept = [_Attributes(module) for module in modules]
    try:
        yield
    finally:
        for attributes in kept:
            attributes.restore()


class _Attributes:
    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._values = {name: value for name, value in vars(module).items() if name not in _NOT_STATE}
        self._buffers = dict(module._buffers)
        self._contents = [
            (value, value.copy()) for value in self._values.values() if type(value) in (list, dict, set)
        ]
        self._tensors = [
            (value, value._version, value.detach().clone())
            for value in self._values.values()
            if isinstance(value, Tensor) and not value.is_inference()
        ]

    def restore(self) -> None:
        now: dict[str, Any] = vars(self._module)
        for name in [name for name in now if name not in self._values and name not in _NOT_STATE]:
            del now[name]
        now.update(self._values)
        for container, content in self._contents:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)
        self._module._buffers.clear()
        self._module._buffers.update(self._buffers)
        for tensor, version, value in self._tensors:
            if tensor._version != version:
                with torch.no_grad():
                    tensor.copy_(value)
