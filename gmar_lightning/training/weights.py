"""Pretrained weights, from timm or from a file, with a plain report of what did not fit."""

import sys
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import timm
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

SHOWN = 8


def create_pretrained(name: str, arguments: dict[str, Any]) -> nn.Module:
    """Build a timm model with its pretrained weights.

    Raises:
        RuntimeError: the weights cannot be fetched.
    """
    if not timm.is_model_pretrained(name):
        raise RuntimeError(
            f"timm has no pretrained weights for {name!r}; give a file with weights, or train from scratch"
        )
    try:
        return timm.create_model(name, pretrained=True, **arguments)
    except OSError as error:
        raise RuntimeError(
            f"the pretrained weights of {name!r} could not be fetched ({type(error).__name__}: {error}). "
            "Without a connection, copy them here and give the file as model.weights"
        ) from error


def refuse_code(path: str | Path) -> None:
    """Refuse a checkpoint whose loading would run code.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds more than tensors and plain values, or is no checkpoint.
    """
    try:
        torch.load(path, map_location="meta", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        raise ValueError(in_words(error)) from error


def in_words(error: Exception) -> str:
    """Why torch would not load a file."""
    if isinstance(error, UnpicklingError) and "Unsupported" in str(error):
        # torch advises to load it all the same, at length
        return (
            "it holds Python objects beside tensors and plain values; loading those can run code that somebody put "
            "there, so they are not loaded. Save the state_dict alone"
        )
    return f"it is no checkpoint that torch can read, or it is damaged ({type(error).__name__})"


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a .safetensors, .pth, .pt, .bin or .ckpt file by name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read, or holds no tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no weights file {path.resolve()}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as weights: {error}") from error
    except Exception as error:
        # torch.load reports a pickle with code in it by its own UnpicklingError, text files by others
        raise ValueError(f"{path} cannot be read safely as tensors: {in_words(error)}") from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    if not tensors:
        raise ValueError(f"{path} holds no tensors by name")
    return tensors


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a file into a timm model; a head for other classes is left out, positions are resized.

    What was missing in the file or not used from it is reported once, as a warning when it concerns more
    than the head.

    Args:
        model: a timm model, any image size.
        path: the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or belongs to another model.
    """
    own = model.state_dict()
    state = _without_prefix(read_weights(path), set(own))
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is not None:
        state = convert(state, model)
    head = tuple(f"{name}." for name in _head_names(model))
    other_shape = {k for k, v in state.items() if k in own and own[k].shape != v.shape}
    replaced = {key for key in other_shape if key.startswith(head)}
    wrong = sorted(other_shape - replaced)
    if wrong or not set(own) & set(state):
        raise ValueError(_mismatch(path, own, state, wrong))
    missing, unexpected = model.load_state_dict(
        {key: value for key, value in state.items() if key not in replaced}, strict=False
    )
    _report(path, len(own), missing, unexpected, head)


def _without_prefix(state: dict[str, Tensor], wanted: set[str]) -> dict[str, Tensor]:
    """Strip the leading `module.` or `model.` under which most of the wanted names are found."""
    prefixes = {""} | {key[: at + 1] for key in state for at, letter in enumerate(key) if letter == "."}
    fits = {prefix: sum(prefix + key in state for key in wanted) for prefix in prefixes}
    best = max(sorted(prefixes, key=len), key=lambda prefix: fits[prefix])
    return {key.removeprefix(best): value for key, value in state.items() if key.startswith(best)}


def _head_names(model: nn.Module) -> list[str]:
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or "head"
    return [names] if isinstance(names, str) else list(names)


def _mismatch(path: str | Path, own: dict[str, Tensor], state: dict[str, Tensor], wrong: list[str]) -> str:
    if not wrong:
        return f"{path} fits no parameter of the model: it has {_some(state)}, the model {_some(own)}"
    shapes = "; ".join(f"{k} {tuple(state[k].shape)}, model {tuple(own[k].shape)}" for k in wrong[:SHOWN])
    return f"{path} belongs to another model: {len(wrong)} parameters of another shape: {shapes}"


def _report(
    path: str | Path, total: int, missing: list[str], unexpected: list[str], head: tuple[str, ...]
) -> None:
    lines = [f"Weights: {total - len(missing)} of {total} tensors from {path}."]
    if missing:
        lines.append(f"Not in the file (or made for other classes), newly initialised: {_some(missing)}.")
    if unexpected:
        lines.append(f"In the file, not used: {_some(unexpected)}.")
    only_head = all(key.startswith(head) for key in [*missing, *unexpected])
    (rank_zero_info if only_head else rank_zero_warn)(" ".join(lines))


def _some(names: Any) -> str:
    names = list(names)
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
