"""What is reachable from a model: a bounded walk over its objects, and a snapshot of the state they hold."""

from __future__ import annotations

import array
import copy
import functools
import io
import itertools
import os
import sys
import types
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gmar_lightning.explain import state
from gmar_lightning.explain.errors import UnsupportedModelError
from gmar_lightning.explain.state import (
    Saved,
    SavedArray,
    SavedClass,
    SavedContainer,
    SavedGeometry,
    SavedNames,
    SavedPosition,
    SavedStorage,
    SavedVersion,
    generator_state,
)

# The walk ends here; what lies beyond is not watched. A ViT-L in a LightningModule has about 20,000 objects.
MOST_OBJECTS = 300_000
# Of longer containers the contents are kept, but only this many elements, evenly spread, are walked into.
_LONG = 2_000
_IMMUTABLE = (
    bool, int, float, complex, str, bytes, range, slice, type(None), type(Ellipsis), types.ModuleType,
    torch.dtype, torch.device, torch.Size, np.dtype, np.generic, types.BuiltinFunctionType,
)  # fmt: skip
# Code that belongs to nobody's experiment: its classes and globals hold no state of a run, or state (compilers,
# process groups, trainers) that only the library itself may put back.
_LIBRARIES = {
    "torch", "torchvision", "torchaudio", "torchmetrics", "numpy", "scipy", "PIL", "pandas", "matplotlib",
    "lightning", "lightning_fabric", "lightning_utilities", "pytorch_lightning", "timm", "transformers",
    "huggingface_hub", "safetensors", "tokenizers", "accelerate", "wandb", "tensorboard", "gmar_lightning",
    "jsonargparse", "pytest", "_pytest", "pluggy", "tqdm", "rich",
}  # fmt: skip
_STANDARD = str(Path(os.__file__).parent)
# Instances of library classes that are state of the user's model all the same.
_WALKED = (
    "torch.nn",
    "torch.ao",
    "torch.optim",
    "transformers",
    "timm",
    "torchvision",
    "torchmetrics",
    "types",
)
_NEVER = ("torch.distributed", "torch._dynamo", "torch._inductor", "torch._functorch", "torch.fx")
# What runs when a model or a data set is asked for something; other methods are followed from there by name.
_ENTRIES = ("forward", "__call__", "__getitem__", "__getitems__", "__iter__", "__next__", "__len__")


class Snapshot:
    """Everything reachable from some roots, as it was when the snapshot was taken.

    Args:
        roots: Name to object.
        keep: Decides by path whether the bytes of a weight are copied; others are known by their write counter.
        skip: Objects that are not entered.
    """

    def __init__(
        self,
        roots: Mapping[str, Any],
        *,
        keep: Callable[[str], bool] = lambda where: True,
        skip: tuple[Any, ...] = (),
    ) -> None:
        self.saved: list[Saved] = []
        self.iterators: list[tuple[str, Any]] = []
        self.unseen: list[str] = []
        self.truncated = False
        self._sharded = any(_is_sharded(root) for root in roots.values())
        self._keep = keep
        # Objects are held, so that no address is used twice while the walk goes on.
        self._seen: dict[int, Any] = {id(thing): thing for thing in skip}
        self._storages: set[int] = set()
        self._queue: deque[tuple[str, Any, bool]] = deque((name, root, False) for name, root in roots.items())
        while self._queue:
            if len(self._seen) > MOST_OBJECTS:
                self.truncated = True
                break
            item = self._queue.popleft()
            try:
                self._visit(*item)
            except Exception:  # an object that does not let itself be looked at
                self.unseen.append(item[0])
        self._seen.clear()

    def guard(self) -> list[_Guard]:
        """Lend copies of live iterators, and in place of those that cannot be copied a guard that raises.

        The originals return with `restore`.
        """
        lent = {id(thing): _lent(where, thing) for where, thing in self.iterators}
        for saved in self.saved:
            if lent and isinstance(saved, (SavedContainer, SavedNames)):
                _quietly(functools.partial(saved.lend, lent))
        return [thing for thing in lent.values() if isinstance(thing, _Guard)]

    def changes(self) -> list[Saved]:
        """What is no longer as it was."""
        return [saved for saved in self.saved if _quietly(saved.changed)]

    def restore(self) -> tuple[list[str], list[str]]:
        """Put everything back; the paths of what had changed, and of those which could not be put back."""
        for saved in self.saved:
            if isinstance(saved, (SavedContainer, SavedNames)):
                _quietly(saved.take_back)
        changed = self.changes()
        for saved in changed:
            _quietly(saved.restore)
        left = [saved.where for saved in changed if not saved.restorable or _quietly(saved.changed)]
        return [saved.where for saved in changed], left

    def _visit(self, where: str, thing: Any, weight: bool) -> None:
        if isinstance(thing, _IMMUTABLE) or id(thing) in self._seen:
            return
        self._seen[id(thing)] = thing
        if isinstance(thing, Tensor):
            self._tensor(where, thing, weight)
        elif isinstance(thing, np.ndarray):
            self._array(where, thing)
        elif isinstance(thing, (dict, list, set, deque, tuple, frozenset)):
            self._container(where, thing, weight)
        elif (generator := generator_state(where, thing)) is not None:
            self.saved.append(generator)
        elif isinstance(thing, (bytearray, array.array)):
            self.saved.append(SavedPosition(where, lambda: thing[:], functools.partial(_refill, thing)))
        else:
            self._behaviour(where, thing)
        self._own_attributes(where, thing)

    def _behaviour(self, where: str, thing: Any) -> None:
        if isinstance(thing, type):
            self._class(where, thing)
        elif isinstance(thing, (types.FunctionType, types.MethodType, functools.partial)):
            self._callable(where, thing)
        elif isinstance(thing, io.IOBase):
            self._file(where, thing)
        elif _is_iterator(thing):
            self.iterators.append((where, thing))
        else:
            self._object(where, thing)

    def _then(self, where: str, thing: Any, weight: bool = False) -> None:
        if not isinstance(thing, _IMMUTABLE):
            self._queue.append((where, thing, weight))

    def _tensor(self, where: str, tensor: Tensor, weight: bool) -> None:
        if hasattr(tensor, "__tensor_flatten__") and not state.is_lazy(tensor):
            for name in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
                self._then(f"{where}.{name}", getattr(tensor, name), weight)
            return
        if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
            return
        self.saved.append(SavedGeometry(where, tensor))
        with torch._C.DisableTorchFunctionSubclass():
            storage, gradient = tensor.untyped_storage(), tensor.grad if tensor.is_leaf else None
        if gradient is not None:
            self._then(f"{where}.grad", gradient, True)
        if storage.nbytes() == 0 or storage._cdata in self._storages:
            return
        self._storages.add(storage._cdata)
        weight = weight or isinstance(tensor, nn.Parameter)
        if weight and not self._keep(where) and not tensor.is_inference():
            self.saved.append(SavedVersion(where, tensor))
        else:
            keep = weight or storage.nbytes() <= state.LARGE
            self.saved.append(
                SavedStorage(where, storage, keep=keep, offload=weight and storage.device.type == "cuda")
            )

    def _array(self, where: str, array: np.ndarray) -> None:
        if isinstance(array, np.memmap) or not array.flags.writeable:
            return
        self.saved.append(SavedArray(where, array))
        if array.dtype == object:
            self._then(f"{where}.flat", list(array.flat[:_LONG]))

    def _container(self, where: str, container: Any, weight: bool) -> None:
        if isinstance(container, (dict, list, set, deque)):
            self.saved.append(SavedContainer(where, container))
        if isinstance(container, dict):
            step = max(1, len(container) // _LONG)
            for key, value in itertools.islice(state.dict_items(container), 0, None, step):
                name = f".{key}" if isinstance(key, str) and key.isidentifier() else f"[{_short(key)}]"
                self._then(where + name, value, weight)
            return
        elements: Any = container if isinstance(container, (list, tuple)) else list(container)
        for index in range(0, len(elements), max(1, len(elements) // _LONG)):
            self._then(f"{where}[{index}]", elements[index], weight)

    def _object(self, where: str, thing: Any) -> None:
        if isinstance(thing, nn.Module):
            self.saved.append(SavedClass(where, thing))
        if isinstance(thing, torch.jit.ScriptModule):
            self._scripted(where, thing)
        kind = type(thing)
        if not _is_watched(kind):
            return
        optimizer = isinstance(thing, torch.optim.Optimizer)
        attributes = _attributes(thing)
        if attributes is not None:
            self.saved.append(SavedContainer(where, attributes))
            for name, value in attributes.items():
                if name in ("_parameters", "_buffers", "_modules") and isinstance(value, dict):
                    # Paths as `named_parameters` writes them. Sharding replaces weights and is left to do so.
                    self._seen[id(value)] = value
                    if self._sharded and name == "_parameters":
                        continue
                    self.saved.append(SavedContainer(f"{where}.{name}", value))
                    for inner, child in value.items():
                        self._then(f"{where}.{inner}", child, name == "_parameters")
                else:
                    self._then(f"{where}.{name}", value, optimizer and name == "state")
        if slots := _slots(kind):
            self._names(where, thing, slots)
        self._then(kind.__qualname__, kind)

    def _own_attributes(self, where: str, thing: Any) -> None:
        """Attributes of a container's or function's subclass beside its contents."""
        if isinstance(thing, (list, dict, set, deque)) and type(thing).__module__ not in (
            "builtins",
            "collections",
        ):
            attributes = _attributes(thing)
            if attributes is not None and _is_watched(type(thing)):
                self._then(where, attributes)

    def _names(self, where: str, thing: Any, slots: tuple[str, ...]) -> None:
        def read() -> dict[str, Any]:
            return {n: object.__getattribute__(thing, n) for n in slots if _has(thing, n)}

        self.saved.append(
            SavedNames(
                where,
                read,
                lambda name, value: object.__setattr__(thing, name, value),
                lambda name: object.__delattr__(thing, name),
            )
        )
        for name, value in read().items():
            self._then(f"{where}.{name}", value)

    def _class(self, where: str, kind: type) -> None:
        for owner in kind.__mro__:
            if _is_library(owner.__module__):
                continue

            def read(owner: type = owner) -> dict[str, Any]:
                return {name: value for name, value in vars(owner).items() if _is_data(name, value)}

            self.saved.append(
                SavedNames(
                    owner.__qualname__,
                    read,
                    lambda name, value, owner=owner: type.__setattr__(owner, name, value),
                    lambda name, owner=owner: type.__delattr__(owner, name),
                )
            )
            for name, value in read().items():
                self._then(f"{owner.__qualname__}.{name}", value)
        for function in _functions_that_run(kind):
            self._then(f"{kind.__qualname__}.{function.__name__}", function)

    def _callable(self, where: str, thing: Any) -> None:
        if isinstance(thing, types.MethodType):
            self._then(where, thing.__self__)
            self._then(where, thing.__func__)
        elif isinstance(thing, types.FunctionType):
            self._function(where, thing)
        else:
            for part in (thing.func, thing.args, thing.keywords):
                self._then(where, part)

    def _function(self, where: str, function: types.FunctionType) -> None:
        if _is_library(function.__module__ or ""):
            return
        for index, cell in enumerate(function.__closure__ or ()):
            name = function.__code__.co_freevars[index]
            self._cell(f"{where}.{name}", cell)
        self._then(f"{where}.__defaults__", function.__defaults__)
        self._then(f"{where}.__kwdefaults__", function.__kwdefaults__)
        self._then(where, function.__dict__)
        self._globals(function.__globals__, _names_in(function.__code__))

    def _cell(self, where: str, cell: Any) -> None:
        def read() -> dict[str, Any]:
            try:
                return {"": cell.cell_contents}
            except ValueError:  # a cell that nothing was put in yet
                return {}

        def write(name: str, value: Any) -> None:
            cell.cell_contents = value

        def delete(name: str) -> None:
            del cell.cell_contents

        self.saved.append(SavedNames(where, read, write, delete))
        for value in read().values():
            self._then(where, value)

    def _globals(self, namespace: dict[str, Any], names: set[str]) -> None:
        module = str(namespace.get("__name__", ""))

        def read() -> dict[str, Any]:
            return {name: namespace[name] for name in names if name in namespace}

        self.saved.append(SavedNames(module, read, namespace.__setitem__, namespace.__delitem__))
        for name, value in read().items():
            if isinstance(value, types.ModuleType):
                if not _is_library(value.__name__) and id(value) not in self._seen:
                    self._globals_of_module(value, names)
            elif not isinstance(value, type) or not _is_library(value.__module__):
                self._then(f"{module}.{name}", value)

    def _globals_of_module(self, module: types.ModuleType, names: set[str]) -> None:
        self._seen[id(module)] = module
        if names & set(vars(module)):
            self._globals(vars(module), names)

    def _file(self, where: str, stream: Any) -> None:
        try:
            if not stream.closed and stream.seekable() and stream.readable():
                self.saved.append(SavedPosition(where, stream.tell, stream.seek))
        except Exception:  # a stream in the middle of being iterated does not tell
            return

    def _scripted(self, where: str, module: Any) -> None:
        kind = getattr(module, "_concrete_type", None)
        core: Any = module._c
        for name in kind.get_attributes() if kind is not None else ():
            value = core.getattr(name)
            if isinstance(value, Tensor):
                self._then(f"{where}.{name}", value)
            elif isinstance(value, (int, float, str, bool, list, dict, tuple)):
                self.saved.append(
                    SavedPosition(
                        f"{where}.{name}",
                        lambda name=name: core.getattr(name),
                        lambda old, name=name: core.setattr(name, old),
                    )
                )


class _Guard:
    """Stands in for a live generator while a probe runs: what was drawn from it could not be put back."""

    def __init__(self, where: str) -> None:
        self.where = where

    def __iter__(self) -> _Guard:
        return self

    def __next__(self) -> Any:
        raise UnsupportedModelError(
            f"the forward pass draws from {self.where}, a live iterator that can be neither rewound nor copied: "
            "what a probe takes from it, training would miss."
        )

    send = throw = __next__


def _lent(where: str, iterator: Any) -> Any:
    if isinstance(iterator, types.GeneratorType) or type(iterator).__module__.startswith("torch."):
        return _Guard(where)
    try:
        return copy.deepcopy(iterator)
    except Exception:
        return _Guard(where)


def _quietly(act: Callable[[], Any]) -> Any:
    # A user's object may refuse to be looked at; then it counts as changed, and is named.
    try:
        return act()
    except Exception:
        return True


def _refill(thing: Any, content: Any) -> None:
    thing[:] = content


def _attributes(thing: Any) -> dict[str, Any] | None:
    try:
        attributes = object.__getattribute__(thing, "__dict__")
    except AttributeError:
        return None
    return attributes if isinstance(attributes, dict) else None


def _has(thing: Any, name: str) -> bool:
    try:
        object.__getattribute__(thing, name)
    except AttributeError:
        return False
    return True


@functools.lru_cache(maxsize=4096)
def _slots(kind: type) -> tuple[str, ...]:
    return tuple(
        name
        for owner in kind.__mro__
        if not _is_library(owner.__module__)
        for name, member in vars(owner).items()
        if isinstance(member, types.MemberDescriptorType)
    )


def _is_library(module: str) -> bool:
    return _is_library_root(module.partition(".")[0])


@functools.cache
def _is_library_root(root: str) -> bool:
    if root in _LIBRARIES or root in sys.builtin_module_names:
        return True
    # By address, not by name: an experiment may well have a `code.py`, `types.py` or `profile.py` of its own.
    file = getattr(sys.modules.get(root), "__file__", None) or ""
    return file.startswith(_STANDARD) and "site-packages" not in file


def _is_watched(kind: type) -> bool:
    module = kind.__module__ or ""
    if issubclass(kind, nn.Module):
        # FSDP (version 1) keeps its own books in the modules it wraps.
        return kind.__name__ != "FullyShardedDataParallel"
    if module.startswith(_NEVER):
        return False
    return not _is_library(module) or module.startswith(_WALKED)


def _is_sharded(root: Any) -> bool:
    return isinstance(root, nn.Module) and any(
        owner.__module__.startswith("torch.distributed.fsdp")
        for part in root.modules()
        for owner in type(part).__mro__
    )


def _is_iterator(thing: Any) -> bool:
    return hasattr(type(thing), "__next__") and _is_library(type(thing).__module__ or "")


def _is_data(name: str, value: Any) -> bool:
    return not (
        name.startswith(("__", "_abc_"))
        or isinstance(value, (types.FunctionType, staticmethod, classmethod, property, type))
        or hasattr(type(value), "__get__")
    )


def _functions_that_run(kind: type) -> list[types.FunctionType]:
    """The functions of a class that its entry points may call, followed by name."""
    functions: dict[str, types.FunctionType] = {}
    for owner in kind.__mro__:
        if not _is_library(owner.__module__):
            for name, value in vars(owner).items():
                inner = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
                if isinstance(inner, types.FunctionType):
                    functions.setdefault(name, inner)
    running, names = list[types.FunctionType](), [name for name in _ENTRIES if name in functions]
    for name in names:  # grows on the way
        running.append(functions[name])
        called = _names_in(functions[name].__code__) & set(functions)
        names.extend(sorted(called - set(names)))
    return running


def _names_in(code: types.CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names_in(constant)
    return names


def _short(key: Any) -> str:
    return repr(key) if isinstance(key, (int, str, float)) else type(key).__name__
