"""Whose code and whose state it is: the user's, which is watched, or a library's, which is not."""

from __future__ import annotations

import functools
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

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


def refill(thing: Any, content: Any) -> None:
    """Write a state back into an array or byte array."""
    thing[:] = content


def attributes_of(thing: Any) -> dict[str, Any] | None:
    """The `__dict__` of an object, past any `__getattr__`; None without one."""
    try:
        attributes = object.__getattribute__(thing, "__dict__")
    except AttributeError:
        return None
    return attributes if isinstance(attributes, dict) else None


def has_value(thing: Any, name: str) -> bool:
    """Whether a slot holds something."""
    try:
        object.__getattribute__(thing, name)
    except AttributeError:
        return False
    return True


@functools.lru_cache(maxsize=4096)
def slots_of(kind: type) -> tuple[str, ...]:
    """Names of the slots that the classes of an object declare."""
    return tuple(
        name
        for owner in kind.__mro__
        if not is_library(owner.__module__)
        for name, member in vars(owner).items()
        if isinstance(member, types.MemberDescriptorType)
    )


def is_library(module: str) -> bool:
    """Whether a module belongs to a library, by its name in dots."""
    return _is_library_root(module.partition(".")[0])


@functools.cache
def _is_library_root(root: str) -> bool:
    if root in _LIBRARIES or root in sys.builtin_module_names:
        return True
    # By address, not by name: an experiment may well have a `code.py`, `types.py` or `profile.py` of its own.
    file = getattr(sys.modules.get(root), "__file__", None) or ""
    return file.startswith(_STANDARD) and "site-packages" not in file


def is_watched(kind: type) -> bool:
    """Whether the attributes of instances of a class are state of the experiment."""
    module = kind.__module__ or ""
    if issubclass(kind, nn.Module):
        # FSDP (version 1) keeps its own books in the modules it wraps.
        return kind.__name__ != "FullyShardedDataParallel"
    if module.startswith(_NEVER):
        return False
    return not is_library(module) or module.startswith(_WALKED)


def is_sharded(root: Any) -> bool:
    """Whether a model is sharded by FSDP."""
    return isinstance(root, nn.Module) and any(
        owner.__module__.startswith("torch.distributed.fsdp")
        for part in root.modules()
        for owner in type(part).__mro__
    )


def is_iterator(thing: Any) -> bool:
    """Whether this is an iterator without attributes of its own to put back."""
    return hasattr(type(thing), "__next__") and is_library(type(thing).__module__ or "")


def is_data(name: str, value: Any) -> bool:
    """Whether an entry of a class is data, not behaviour."""
    return not (
        name.startswith(("__", "_abc_"))
        or isinstance(value, (types.FunctionType, staticmethod, classmethod, property, type))
        or hasattr(type(value), "__get__")
    )


def functions_that_run(kind: type) -> list[types.FunctionType]:
    """The functions of a class that its entry points may call, followed by name."""
    functions: dict[str, types.FunctionType] = {}
    for owner in kind.__mro__:
        if not is_library(owner.__module__):
            for name, value in vars(owner).items():
                inner = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
                if isinstance(inner, types.FunctionType):
                    functions.setdefault(name, inner)
    running, names = list[types.FunctionType](), [name for name in _ENTRIES if name in functions]
    for name in names:  # grows on the way
        running.append(functions[name])
        called = names_in(functions[name].__code__) & set(functions)
        names.extend(sorted(called - set(names)))
    return running


def names_in(code: types.CodeType) -> set[str]:
    """Global names and attribute names that code uses, nested functions included."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= names_in(constant)
    return names


def short_key(key: Any) -> str:
    """A dictionary key as a path shows it."""
    return repr(key) if isinstance(key, (int, str, float)) else type(key).__name__


def quietly(act: Callable[[], Any]) -> Any:
    """The result of an action; True where it raises."""
    # A user's object may refuse to be looked at; then it counts as changed, and is named.
    try:
        return act()
    except Exception:
        return True
