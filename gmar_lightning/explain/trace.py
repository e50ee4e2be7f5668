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

from gmar_lightning.explain.softmax import HandWritten

# What `torch.compile`, activation checkpointing and FSDP put between a module and its name.
_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
_CONVOLUTIONS = frozenset(
    f"conv{transposed}{dims}d" for transposed in ("", "_transpose") for dims in (1, 2, 3)
)
_POOLS = frozenset(
    f"{kind}_pool{dims}d" for kind in ("avg", "max", "adaptive_avg", "adaptive_max") for dims in (1, 2)
)
_FFTS = frozenset(name for name in dir(torch.fft) if "fft" in name and not name.startswith("_"))
_PRODUCTS = frozenset(
    {"mul", "rmul", "imul", "multiply", "div", "truediv", "itruediv", "true_divide", "divide"}
)
_POWERS = frozenset({"pow", "rpow", "ipow", "square", "float_power", "exp", "expm1", "exp2"})
# Attention in one operation that neither the name nor the function mode can open.
_OPAQUE = frozenset({"flex_attention", "varlen_attn"})

# Attributes that are no tensors: nothing to follow, and three of four functions that a mode is asked for.
ATTRIBUTES = frozenset(
    getattr(Tensor, name).__get__
    for name in ("shape", "ndim", "dtype", "device", "layout", "requires_grad", "grad_fn", "is_leaf")
)


@dataclass
class _Frame:
    module: nn.Module
    invocation: int
    called: bool = False
    entering: tuple[Tensor, ...] = ()

    @property
    def attention_like(self) -> bool:
        kind = type(self.module).__name__.lower()
        return "attention" in kind or "attn" in kind


class TokenTrail:
    """Tensors with one vector per token: what the first attention read, and what followed the last one.

    Attributes:
        entering: Tensors with one vector per token on the way to the first attention, in order.
        leaving: Token tensors after the last attention, in order.
        before_pool: The same before an attention call that gathered the tokens into one, if the last one did.
        products: Token tensors after the last attention that are products, with their factors, or powers, without.
        read_place: How many-eth tensor after the last attention the readout was taken from.
        wanted: Number of the tensor to keep in a pass without gradients.
        kept: That tensor.
    """

    def __init__(self) -> None:
        self.entering: list[Tensor] = []
        self.leaving: list[Tensor] = []
        self.before_pool: list[Tensor] = []
        self.products: list[tuple[Tensor, tuple[Tensor, ...]]] = []
        self.read_place: int | None = None
        self.wanted: int | None = None
        self.kept: Tensor | None = None
        self._places: dict[int, int] = {}
        self._count = 0
        self._sizes: tuple[int, int] | None = None

    def note(self, tensor: Tensor) -> None:
        """A function or module returned `tensor`."""
        if tensor.ndim not in (3, 4):
            return
        if self._sizes is None:
            if tensor.ndim == 3 and tensor.requires_grad:
                self.entering.append(tensor)
        elif as_tokens(tensor, *self._sizes) is not None:
            if self._count == self.wanted:
                self.kept = tensor.clone()
            if tensor.requires_grad:
                # By identity: `leaving` keeps the tensor alive, so that its id cannot be given to another.
                self._places[id(tensor)] = self._count
                self.leaving.append(tensor)
            self._count += 1

    def note_product(self, name: str, operands: tuple[Any, ...], result: Tensor) -> None:
        """A function called `name` returned `result`."""
        name = name.strip("_")
        if self._sizes is None or not result.requires_grad or as_tokens(result, *self._sizes) is None:
            return
        factors = tuple(operand.detach() for operand in operands if isinstance(operand, Tensor))
        if name in _PRODUCTS and len(factors) == 2:
            self.products.append((result, factors))
        elif name in _POWERS:
            self.products.append((result, ()))

    def place(self, tensor: Tensor) -> int | None:
        """Number of one of the tensors `leaving`, counted over those without gradients as well."""
        return self._places.get(id(tensor))

    def saw_attention(self, batch: int, queries: int, keys: int) -> None:
        """An attention call from `queries` to `keys` tokens was computed."""
        if self._sizes is None:
            self.entering = [t for t in self.entering if as_tokens(t, batch, keys) is not None]
        self._sizes = batch, queries
        # An attention pool gathers all tokens into one; what it read is needed if the logits turn out not
        # to use it.
        self.before_pool = self.leaving if queries == 1 < keys else []
        self.leaving, self.products, self.kept, self._count = [], [], None, 0


def as_tokens(tensor: Tensor, batch: int, tokens: int) -> Tensor | None:
    """`tensor` seen as `(batch, tokens, channels)`; None when its shape does not allow it."""
    shape = tuple(tensor.shape)
    if len(shape) == 3 and shape[:2] == (batch, tokens):
        return tensor
    if len(shape) == 3 and shape[:2] == (tokens, batch):
        return tensor.transpose(0, 1)
    if len(shape) == 4 and shape[0] == batch and shape[1] * shape[2] == tokens:
        return tensor.flatten(1, 2)
    return None


class ModuleTrace:
    """Follows one forward pass through process-wide hooks and a function mode; the modules stay untouched.

    Attributes:
        grids: Height and width of 2-D convolution outputs before any attention, the latest first.
        mixers: What mixed tokens outside the attention, after the first attention.
        softmaxes: Modules that compute attention-like softmaxes by hand, without values they are multiplied with.
        hand: Follows scores and maps of attention written by hand.
        suspects: Modules with a softmax of attention-like shape, not of a product: linear attention, or a router.
        silent: Modules named as attention that ran without a call that was intercepted.
        handed_out: Graph nodes of attention weights that modules returned beside their output.
        tokens: The token tensors on the way.
        pooled: What the last linear layer on `(batch, features)` read: the classifier's input.
    """

    def __init__(self) -> None:
        self.grids: list[tuple[int, int]] = []
        self.mixers: list[str] = []
        self.softmaxes: list[str] = []
        self.suspects: list[str] = []
        self.silent: list[str] = []
        self.handed_out: set[Any] = set()
        self.hand = HandWritten(self.running)
        self.tokens = TokenTrail()
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
        handles = []
        try:
            # Process-wide hooks, so that no hook dictionary of the user's modules is touched. The
            # inside of a scripted module calls none of them.
            handles.append(module_hooks.register_module_forward_pre_hook(self._enter))
            handles.append(module_hooks.register_module_forward_hook(self._leave, always_call=True))
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

    def running(self) -> list[tuple[int, bool]]:
        """Invocation number of each running module, outermost first, and whether it has parameters."""
        return [(f.invocation, next(f.module.parameters(), None) is not None) for f in self._stack]

    def entering(self) -> tuple[Tensor, ...]:
        """What the innermost running module with parameters was given, as far as it is in a graph."""
        for frame in reversed(self._stack):
            if frame.entering and next(frame.module.parameters(), None) is not None:
                return frame.entering
        return ()

    def saw_call(self) -> None:
        """An attention call was computed inside the running modules, whatever it attended over."""
        for frame in self._stack:
            frame.called = True

    def saw_attention(self, batch: int, queries: int, keys: int) -> None:
        """An attention call that the images reach went from `queries` to `keys` tokens."""
        self.tokens.saw_attention(batch, queries, keys)
        self._token_count = keys

    def saw_function(self, func: Any, operands: tuple[Any, ...], result: Any, is_softmax: bool) -> None:
        """A torch function of `operands` returned `result`."""
        if self._foreign():
            return
        of_scores = self.hand.saw(func, operands, result, is_softmax, self._where() if is_softmax else "")
        if not isinstance(result, Tensor):
            return
        self.tokens.note(result)
        if of_scores:
            self.softmaxes.append(self._where())
        elif is_softmax and _looks_like_attention(result):
            self.suspects.append(self._where())
        name = getattr(func, "__name__", "").lstrip("_")
        self.tokens.note_product(name, operands, result)
        if name in _OPAQUE:
            self.silent.append(f"{self._where()} calling {name}")
        elif self._token_count is None:
            if name == "conv2d" and result.ndim == 4:
                self.grids.insert(0, (result.shape[-2], result.shape[-1]))
        elif result.requires_grad and _mixes_tokens(name, operands, result, self._token_count):
            # What has no gradient (a teacher under `no_grad`) is beside the way from the images to the logits.
            self.mixers.append(f"{self._where()} by {name}")

    def _where(self) -> str:
        name, owner, _ = self.current()
        return f"{name} ({owner})"

    def _enter(self, module: nn.Module, args: Any) -> None:
        if self._foreign():
            return
        entering = tuple(x for x in args if isinstance(x, Tensor) and x.ndim >= 3 and x.grad_fn is not None)
        self._stack.append(_Frame(module, next(self._count), entering=entering))
        # The last one wins: the classifier's input, also where the head is several layers deep.
        if isinstance(module, nn.Linear) and args and isinstance(args[0], Tensor) and args[0].ndim == 2:
            self.pooled = args[0]

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._foreign():
            return
        # A module whose forward raised, or was left by an exception that someone caught, never reports its
        # end.
        while self._stack and (frame := self._stack.pop()):
            self._note_silence(frame)
            if frame.module is module:
                break
        if isinstance(output, Tensor):
            self.tokens.note(output)

    def _note_silence(self, frame: _Frame) -> None:
        # `ViTAttention` around `ViTSelfAttention`: the outer one is heard when the inner one is.
        nested = any(outer.attention_like for outer in self._stack)
        if frame.attention_like and not frame.called and not nested:
            self.silent.append(f"{self._names.get(frame.module, '')} ({type(frame.module).__name__})")

    def _foreign(self) -> bool:
        return threading.get_ident() != self._thread or in_backward()


def in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread (checkpointed layers recompute there)."""
    # Private, and without a public equal: the number of the running backward pass, -1 outside of one.
    return torch._C._current_graph_task_id() != -1


def _mixes_tokens(name: str, operands: tuple[Any, ...], result: Tensor, tokens: int) -> bool:
    """Whether a function moved information between positions; a global pool that leaves one does not count."""
    if name in _CONVOLUTIONS:
        return max(operands[1].shape[2:]) > 1
    if name in _POOLS:
        dims = int(name[-2])
        return result.shape[-dims:].numel() > 1
    if name == "linear":
        shape = operands[0].shape
        # A linear layer over the token axis, as MLP-Mixer has it: the features it mixes are as many as the
        # tokens.
        return len(shape) >= 3 and shape[-1] == tokens and shape[-2] != tokens
    return name in _FFTS


def _looks_like_attention(result: Tensor) -> bool:
    return result.ndim >= 4 or (result.ndim == 3 and result.shape[-1] == result.shape[-2])


def _plain(path: str) -> str:
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)
