"""Which module is running, and what the path from image to logits showed on the way."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

__all__ = ["ModuleTrace", "in_backward"]

_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass
class _Frame:
    module: nn.Module
    invocation: int
    called: bool = False

    @property
    def attention_like(self) -> bool:
        kind = type(self.module).__name__.lower()
        return "attention" in kind or "attn" in kind


class ModuleTrace:
    """Follows the modules of one forward pass through process-wide hooks; the modules stay untouched.

    Attributes:
        grid: Height and width of the last 2-D convolution's output before any attention: the live patch grid.
        convolutions: Modules that mixed neighbouring positions by convolution after the first attention.
        silent: Modules named as attention that ran without passing the door.
        tokens: What modules returned as `(batch, tokens, channels)` after the last attention, in order.
        pooled: What the last linear layer on `(batch, features)` read: the classifier's input.
    """

    def __init__(self) -> None:
        self.grid: tuple[int, int] | None = None
        self.convolutions: list[str] = []
        self.silent: list[str] = []
        self.tokens: list[Tensor] = []
        self.pooled: Tensor | None = None
        self._names: dict[nn.Module, str] = {}
        self._stack: list[_Frame] = []
        self._count = itertools.count()
        self._token_count: int | None = None
        self._thread = threading.get_ident()

    @contextmanager
    def following(self, model: nn.Module) -> Iterator[None]:
        """Keep the trace up to date inside the block."""
        self._names = {module: _plain(path) for path, module in model.named_modules()}
        handles = [
            module_hooks.register_module_forward_pre_hook(self._enter),
            module_hooks.register_module_forward_hook(self._leave, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._stack.clear()

    def current(self) -> tuple[str, str, int]:
        """Path, class name and invocation number of the innermost named module that is running."""
        for frame in reversed(self._stack):
            if frame.module in self._names:
                return self._names[frame.module], type(frame.module).__name__, frame.invocation
        return "", "the model", -1

    def saw_attention(self, output: Tensor) -> None:
        """An attention call was computed inside the running modules."""
        for frame in self._stack:
            frame.called = True
        self._token_count = output.shape[-2]
        self.tokens.clear()

    def _enter(self, module: nn.Module, args: Any) -> None:
        if self._foreign():
            return
        self._stack.append(_Frame(module, next(self._count)))
        if isinstance(module, nn.Linear) and args and isinstance(args[0], Tensor) and args[0].ndim == 2:
            self.pooled = args[0]

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._foreign():
            return
        while self._stack and (frame := self._stack.pop()):
            self._note_silence(frame)
            if frame.module is module:
                break
        if isinstance(output, Tensor):
            self._note_output(module, output)

    def _note_output(self, module: nn.Module, output: Tensor) -> None:
        if isinstance(module, _CONVOLUTIONS):
            if self._token_count is None and output.ndim == 4:
                self.grid = (output.shape[-2], output.shape[-1])
            elif self._token_count is not None and max(module.kernel_size) > 1:
                self.convolutions.append(self._describe(module))
        if output.ndim == 3 and output.shape[1] == self._token_count and output.requires_grad:
            self.tokens.append(output)

    def _note_silence(self, frame: _Frame) -> None:
        nested = any(outer.attention_like for outer in self._stack)
        if frame.attention_like and not frame.called and not nested:
            self.silent.append(self._describe(frame.module))

    def _describe(self, module: nn.Module) -> str:
        return f"{self._names.get(module, '')} ({type(module).__name__})"

    def _foreign(self) -> bool:
        return threading.get_ident() != self._thread or in_backward()


def in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread (checkpointed layers recompute there)."""
    return torch._C._current_graph_task_id() != -1


def _plain(path: str) -> str:
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)
