"""Everything a probe must not leave behind: one context manager, one place."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Run a probe on a live module and hand the module and the process back as they were found.

    Inside, `module` is in evaluation mode, gradients are enabled (even when called under `no_grad` or
    `inference_mode`), compiled code runs eagerly without being recompiled, and autocast keeps its dtype but
    caches nothing. On every exit path, exceptions and KeyboardInterrupt included, the training flag of each
    submodule, the buffers, the random states of torch, CUDA, NumPy and Python, the grad mode and the compile
    stance are as before.

    Args:
        module: The module about to be run; its parameters and their `.grad` are never written.
    """
    with ExitStack() as stack:
        stack.enter_context(isolated_random_state())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_uncached_autocast())
        stack.enter_context(_buffers_kept(module))
        stack.enter_context(_evaluation_mode(module))
        yield


@contextmanager
def isolated_random_state(seed: int | None = None) -> Iterator[None]:
    """Restore the random states of torch, CUDA, NumPy and Python afterwards, whatever was drawn.

    Args:
        seed: Seed all of them with this number inside; None leaves them where they are.
    """
    # Asking CUDA for its state would initialise it, which no diagnostic should do on its own.
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    cpu, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        if seed is not None:
            # torch.manual_seed would also note a seed for a CUDA that is yet to be initialised.
            torch.default_generator.manual_seed(seed)
            if cuda is not None:
                torch.cuda.manual_seed_all(seed)
            np.random.seed(seed)
            random.seed(seed)
        yield
    finally:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        np.random.set_state(numpy_state)
        random.setstate(python_state)


@contextmanager
def _evaluation_mode(module: nn.Module) -> Iterator[None]:
    # The flag is set directly: .eval() and .train() may be overridden (frozen norms, merged adapters),
    # and a blanket .train() afterwards would thaw what the user froze.
    flags = [(submodule, submodule.training) for submodule in module.modules()]
    try:
        for submodule, _ in flags:
            submodule.training = False
        yield
    finally:
        for submodule, training in flags:
            submodule.training = training


@contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    # Tensors made under inference mode count no versions, and may only be written there.
    kept = [(b, None if b.is_inference() else b._version, b.detach().clone()) for b in module.buffers()]
    try:
        yield
    finally:
        for buffer, version, value in kept:
            if version is None or buffer._version != version:
                with torch.inference_mode(version is None), torch.no_grad():
                    buffer.copy_(value)


@contextmanager
def _uncached_autocast() -> Iterator[None]:
    # A cached low-precision weight would carry the probe's graph into the training step that follows.
    with ExitStack() as stack:
        for device_type in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device_type):
                dtype = torch.get_autocast_dtype(device_type)
                stack.enter_context(torch.autocast(device_type, dtype=dtype, cache_enabled=False))
        yield
