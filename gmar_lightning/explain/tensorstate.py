"""Tensors kept as they are: their memory, the bytes in it, and lazy layers that a forward would materialise."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from gmar_lightning.explain.state import Saved, SavedPosition

# A large storage is compared on so many blocks of so many bytes.
_SAMPLES, _BLOCK = 64, 4096


class SavedClass(Saved):
    """The class of a module: lazy layers turn into ordinary ones by assignment, and back the same way."""

    def __init__(self, where: str, module: nn.Module) -> None:
        super().__init__(where)
        self._module, self._class = module, type(module)

    def changed(self) -> bool:
        """See `Saved`."""
        return type(self._module) is not self._class

    def restore(self) -> None:
        """See `Saved`."""
        self._module.__class__ = self._class


class SavedGeometry(Saved):
    """Which memory a tensor shows, and how: storage, shape, strides, class, `requires_grad`, `.grad`."""

    def __init__(self, where: str, tensor: Tensor) -> None:
        super().__init__(where)
        self._tensor, self._class = tensor, type(tensor)
        # A lazy parameter refuses most attributes through its own __torch_function__.
        with torch._C.DisableTorchFunctionSubclass(), torch.inference_mode(tensor.is_inference()):
            self._alias = tensor.detach()
            self._leaf = tensor.is_leaf
            self._gradient = tensor.grad if tensor.is_leaf else None
            self._trained = tensor.requires_grad

    def changed(self) -> bool:
        """See `Saved`."""
        tensor = self._tensor
        with torch._C.DisableTorchFunctionSubclass():
            return (
                type(tensor) is not self._class
                or _geometry(tensor) != _geometry(self._alias)
                or (self._leaf and tensor.is_leaf and tensor.grad is not self._gradient)
                or (self._leaf and tensor.requires_grad != self._trained)
            )

    def restore(self) -> None:
        """See `Saved`."""
        tensor = self._tensor
        with torch._C.DisableTorchFunctionSubclass(), torch.inference_mode(tensor.is_inference()):
            if _geometry(tensor) != _geometry(self._alias):
                tensor.data = self._alias
            if self._leaf:
                # An in-place operation of the graph turned a leaf into a result; its history goes.
                tensor = tensor if tensor.is_leaf else tensor.detach_()
                tensor.requires_grad_(self._trained)
                tensor.grad = self._gradient
        if type(self._tensor) is not self._class:
            # A lazy parameter turns into an ordinary one by assignment of its class, and back the same way.
            self._tensor.__class__ = self._class


class SavedStorage(Saved):
    """The bytes behind tensors; one entry however many tensors show them.

    Args:
        where: Path of a tensor that shows them.
        storage: The memory.
        keep: Whether the bytes are copied; else only a sample of them is, which tells but cannot restore.
        offload: Whether the copy goes to the CPU, where it does not add to the peak of a training on a GPU.
    """

    def __init__(self, where: str, storage: Any, *, keep: bool = True, offload: bool = False) -> None:
        super().__init__(where)
        self._storage, self._size, self.restorable = storage, storage.nbytes(), keep
        now = self._bytes()
        self._saved = now.to("cpu", copy=True) if keep and offload else now.clone()

    def _bytes(self) -> Tensor:
        with torch.inference_mode(False):
            view = torch.empty(0, dtype=torch.uint8, device=self._storage.device).set_(self._storage)
        return view if self.restorable else sample(view)

    def changed(self) -> bool:
        """See `Saved`."""
        if self._storage.nbytes() != self._size:
            return True
        return not torch.equal(self._bytes().to(self._saved.device), self._saved)

    def restore(self) -> None:
        """See `Saved`."""
        if self.restorable:
            if self._storage.nbytes() != self._size:
                self._storage.resize_(self._size)
            with torch.inference_mode(False), torch.no_grad():
                self._bytes().copy_(self._saved)


class SavedVersion(Saved):
    """Only the write counter of a weight: cheap, tells of writes in place, and cannot restore them."""

    restorable = False
    watched = True

    def __init__(self, where: str, tensor: Tensor) -> None:
        super().__init__(where)
        self._tensor, self._version = tensor, tensor._version

    def changed(self) -> bool:
        """See `Saved`."""
        return self._tensor._version != self._version

    def restore(self) -> None:
        """There is nothing to put back."""


def is_lazy(tensor: Tensor) -> bool:
    """Whether a parameter or buffer waits for the first forward to learn its shape."""
    return isinstance(tensor, nn.parameter.UninitializedParameter | nn.parameter.UninitializedBuffer)


def sample(view: Tensor) -> Tensor:
    """Bytes of 64 blocks spread evenly over a flat byte tensor."""
    starts = torch.linspace(0, max(0, len(view) - _BLOCK), _SAMPLES, dtype=torch.float64).long().tolist()
    return torch.cat([view[start : start + _BLOCK] for start in starts])


def _geometry(tensor: Tensor) -> Any:
    storage = tensor.untyped_storage()
    # Storage objects are made anew at each call; the address of the C++ storage is what stays.
    return storage._cdata, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def scripted_attributes(where: str, module: torch.jit.ScriptModule) -> tuple[list[Saved], dict[str, Tensor]]:
    """What a scripted module keeps in C++: numbers, strings and lists as saved state, and its tensors by path."""
    kind, core = getattr(module, "_concrete_type", None), getattr(module, "_c", None)
    saved, tensors = list[Saved](), dict[str, Tensor]()
    if kind is None or core is None:
        return saved, tensors
    held: Any = core
    for name in kind.get_attributes():
        value = held.getattr(name)
        if isinstance(value, Tensor):
            tensors[f"{where}.{name}"] = value
        elif isinstance(value, (int, float, str, bool, list, dict, tuple)):
            read, write = functools.partial(held.getattr, name), functools.partial(held.setattr, name)
            saved.append(SavedPosition(f"{where}.{name}", read, write))
    return saved, tensors
