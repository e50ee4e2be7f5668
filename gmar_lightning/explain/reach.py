"""What is reachable from a model: a bounded walk over its objects, and a snapshot of the state they hold."""

from __future__ import annotations

import array
import functools
import io
import itertools
import types
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gmar_lightning.explain import state
from gmar_lightning.explain.iterators import Guard, lent
from gmar_lightning.explain.namespaces import (
    SavedNames,
    saved_cell,
    saved_class,
    saved_globals,
    saved_slots,
)
from gmar_lightning.explain.state import (
    Saved,
    SavedArray,
    SavedContainer,
    SavedPosition,
    generator_state,
    shared_state,
)
from gmar_lightning.explain.tensorstate import (
    SavedClass,
    SavedGeometry,
    SavedStorage,
    SavedVersion,
    is_lazy,
    scripted_attributes,
)
from gmar_lightning.explain.watched import (
    attributes_of,
    functions_that_run,
    is_iterator,
    is_library,
    is_sharded,
    is_watched,
    names_in,
    quietly,
    refill,
    short_key,
    slots_of,
)

# The walk ends here; what lies beyond is not watched. A ViT-L in a LightningModule has about 20,000 objects.
MOST_OBJECTS = 300_000
# Of longer containers the contents are kept, but only this many elements, evenly spread, are walked into.
_LONG = 2_000
_IMMUTABLE = (
    bool, int, float, complex, str, bytes, range, slice, type(None), type(Ellipsis), types.ModuleType,
    torch.dtype, torch.device, torch.Size, np.dtype, np.generic, types.BuiltinFunctionType,
)  # fmt: skip


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
        self._sharded = any(is_sharded(root) for root in roots.values())
        self._keep = keep
        # Objects are held, so that no address is used twice while the walk goes on.
        self._seen: dict[int, Any] = {id(thing): thing for thing in skip}
        self._storages: set[int] = set()
        self._buffers: set[int] = set()  # of modules: kept whatever their size, as weights are
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

    def guard(self) -> list[Guard]:
        """Lend copies of live iterators, and in place of those that cannot be copied a guard that raises.

        The originals return with `restore`.
        """
        loans = {id(thing): lent(where, thing) for where, thing in self.iterators}
        for saved in self.saved:
            if loans and isinstance(saved, (SavedContainer, SavedNames)):
                quietly(functools.partial(saved.lend, loans))
        return [thing for thing in loans.values() if isinstance(thing, Guard)]

    def at_risk(self) -> list[str]:
        """Paths of what could not be put back if it changed: too large, or it refuses to be set to what it is."""
        positions = (saved for saved in self.saved if isinstance(saved, SavedPosition))
        refusing = {id(saved) for saved in positions if quietly(saved.restore)}
        return [s.where for s in self.saved if id(s) in refusing or (not s.restorable and not s.watched)]

    def changes(self) -> list[Saved]:
        """What is no longer as it was."""
        return [saved for saved in self.saved if quietly(saved.changed)]

    def restore(self) -> tuple[list[str], list[str], list[str]]:
        """Put everything back.

        Returns:
            The paths of what had changed; of those which could not be put back; and of those among the latter
            that were only watched, and can be kept next time.
        """
        for saved in self.saved:
            if isinstance(saved, (SavedContainer, SavedNames)):
                quietly(saved.take_back)
        changed = self.changes()
        for saved in changed:
            quietly(saved.restore)
        left = [saved for saved in changed if not saved.restorable or quietly(saved.changed)]
        return (
            [saved.where for saved in changed],
            [saved.where for saved in left],
            [saved.where for saved in left if saved.watched],
        )

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
        elif (position := generator_state(where, thing) or shared_state(where, thing)) is not None:
            self.saved.append(position)
        elif isinstance(thing, (bytearray, array.array)):
            self.saved.append(SavedPosition(where, lambda: thing[:], functools.partial(refill, thing)))
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
        elif is_iterator(thing):
            self.iterators.append((where, thing))
        else:
            self._object(where, thing)

    def _then(self, where: str, thing: Any, weight: bool = False) -> None:
        if not isinstance(thing, _IMMUTABLE):
            self._queue.append((where, thing, weight))

    def _tensor(self, where: str, tensor: Tensor, weight: bool) -> None:
        if hasattr(tensor, "__tensor_flatten__") and not is_lazy(tensor):
            for name in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
                self._then(f"{where}.{name}", getattr(tensor, name), weight)
            return
        if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
            return
        weight = weight or isinstance(tensor, nn.Parameter)
        if weight and self._sharded:
            return  # sharding moves weights about, and puts them back itself
        self.saved.append(SavedGeometry(where, tensor))
        with torch._C.DisableTorchFunctionSubclass():
            storage, gradient = tensor.untyped_storage(), tensor.grad if tensor.is_leaf else None
        if gradient is not None:
            self._then(f"{where}.grad", gradient, True)
        if storage.nbytes() == 0 or storage._cdata in self._storages:
            return
        self._storages.add(storage._cdata)
        if weight and not self._keep(where) and not tensor.is_inference():
            self.saved.append(SavedVersion(where, tensor))
        else:
            small = storage.nbytes() <= state.LARGE
            own = weight or id(tensor) in self._buffers
            offload = (weight or not small) and storage.device.type == "cuda"
            self.saved.append(SavedStorage(where, storage, keep=own or small, offload=offload))

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
                name = f".{key}" if isinstance(key, str) and key.isidentifier() else f"[{short_key(key)}]"
                self._then(where + name, value, weight)
            return
        elements: Any = container if isinstance(container, (list, tuple)) else list(container)
        for index in range(0, len(elements), max(1, len(elements) // _LONG)):
            self._then(f"{where}[{index}]", elements[index], weight)

    def _object(self, where: str, thing: Any) -> None:
        if isinstance(thing, nn.Module):
            self.saved.append(SavedClass(where, thing))
        if isinstance(thing, torch.jit.ScriptModule):
            numbers, tensors = scripted_attributes(where, thing)
            self.saved += numbers
            for name, tensor in tensors.items():
                self._then(name, tensor)
        kind = type(thing)
        if kind.__name__ == "FullyShardedDataParallel":
            # FSDP (version 1) keeps its own books in the modules it wraps; only what it wraps is the user's.
            for name, child in vars(thing)["_modules"].items():
                self._then(f"{where}.{name}", child)
        if not is_watched(kind):
            return
        self._attributes(where, thing)
        if names := slots_of(kind):
            self._bound(saved_slots(where, thing, names))
        self._then(kind.__qualname__, kind)

    def _attributes(self, where: str, thing: Any) -> None:
        optimizer, own = isinstance(thing, torch.optim.Optimizer), attributes_of(thing)
        if own is None:
            return
        self.saved.append(SavedContainer(where, own))
        for name, value in own.items():
            if name not in ("_parameters", "_buffers", "_modules") or not isinstance(value, dict):
                self._then(f"{where}.{name}", value, optimizer and name == "state")
                continue
            # Paths as `named_parameters` writes them. Sharding replaces weights and is left to do so.
            self._seen[id(value)] = value
            if self._sharded and name == "_parameters":
                continue
            self.saved.append(SavedContainer(f"{where}.{name}", value))
            if name == "_buffers":
                self._buffers.update(map(id, value.values()))
            for inner, child in value.items():
                self._then(f"{where}.{inner}", child, name == "_parameters")

    def _own_attributes(self, where: str, thing: Any) -> None:
        """Attributes of a container's or function's subclass beside its contents."""
        if isinstance(thing, (list, dict, set, deque)) and type(thing).__module__ not in (
            "builtins",
            "collections",
        ):
            own = attributes_of(thing)
            if own is not None and is_watched(type(thing)):
                self._then(where, own)

    def _class(self, where: str, kind: type) -> None:
        for owner in kind.__mro__:
            if not is_library(owner.__module__):
                self._bound(saved_class(owner))
        for function in functions_that_run(kind):
            self._then(f"{kind.__qualname__}.{function.__name__}", function)

    def _bound(self, names: SavedNames) -> None:
        self.saved.append(names)
        for name, value in names.values.items():
            self._then(f"{names.where}.{name}".rstrip("."), value)

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
        if is_library(function.__module__ or ""):
            return
        for index, cell in enumerate(function.__closure__ or ()):
            name = function.__code__.co_freevars[index]
            self._bound(saved_cell(f"{where}.{name}", cell))
        self._then(f"{where}.__defaults__", function.__defaults__)
        self._then(f"{where}.__kwdefaults__", function.__kwdefaults__)
        self._then(where, function.__dict__)
        self._globals(function.__globals__, names_in(function.__code__))

    def _globals(self, namespace: dict[str, Any], names: set[str]) -> None:
        module = str(namespace.get("__name__", ""))
        saved = saved_globals(module, namespace, names)
        self.saved.append(saved)
        for name, value in saved.values.items():
            if isinstance(value, types.ModuleType):
                if not is_library(value.__name__) and id(value) not in self._seen:
                    self._globals_of_module(value, names)
            elif not isinstance(value, type) or not is_library(value.__module__):
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
