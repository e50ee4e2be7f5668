"""Sharded weights put together one unit at a time, for as long as a pass of a probe needs them.

A probe runs backward several times over parts of one graph, and a process may fail in the middle: the hooks with
which FSDP gathers weights, made for one forward and one backward on every process, foresee neither. So they rest
while a probe lasts. Each unit (what was wrapped or passed to `fully_shard`: a block, as a rule) is gathered when its
forward begins and let go when it ends; the graph remembers which unit a weight belongs to instead of the weight, and
the backward gathers the unit again where it meets one. At most one unit is whole at any time, beside the outermost
one (patch embedding, norm, head), which stays, and beside units that contain the running one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gmar_lightning.explain.errors import UnsupportedModelError
from gmar_lightning.explain.structure import gates_open_in, when_gates_are_open
from gmar_lightning.explain.trace import in_backward

_NOTHING = -1


def check_weights(model: nn.Module) -> None:
    """Refuse weights that are cut up in a way that gathering units does not undo.

    Raises:
        UnsupportedModelError: Naming the parameter.
    """
    kinds = [kind.__name__ for part in model.modules() for kind in type(part).__mro__]
    for name, weight in model.named_parameters():
        why = None
        placements = getattr(weight, "placements", ())
        # FSDP 2 shards along one axis of the mesh, and may repeat along another; a second one is tensor parallelism.
        if sum(place.is_shard() for place in placements) > ("FSDPModule" in kinds):
            why = "is split between processes by tensor parallelism, so that no process sees whole attention maps"
        elif hasattr(weight, "ds_id"):
            why = "is partitioned by DeepSpeed (ZeRO stage 3)"
        if why is not None:
            raise UnsupportedModelError(
                f"{name} {why}. Sharding by FSDP (FullyShardedDataParallel or fully_shard) is supported."
            )


class Unit:
    """Modules whose weights are sharded, and gathered, together.

    Attributes:
        module: The wrapped module.
        number: The same on every process.
        outermost: Whether no other unit contains it.
        modules: Its modules without those of units inside it.
    """

    def __init__(self, module: nn.Module, number: int, outermost: bool, inner: set[nn.Module]) -> None:
        self.module, self.number, self.outermost = module, number, outermost
        self.modules = [part for part in module.modules() if part not in inner]

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """The weights whole inside the block; every process must enter and leave."""
        from torch.distributed.fsdp import FullyShardedDataParallel

        module: Any = self.module
        if isinstance(module, FullyShardedDataParallel):
            # writeback=False: a probe changes no weight, so nothing has to be cut up again.
            with FullyShardedDataParallel.summon_full_params(module, recurse=False, writeback=False):
                yield
            return
        module.unshard()
        try:
            yield
        finally:
            module.reshard()

    def storages(self) -> set[int]:
        """Addresses of the memory of its weights, while they are whole."""
        weights = [weight for part in self.modules for weight in part._parameters.values()]
        return {w.untyped_storage()._cdata for w in weights if w is not None and type(w.data) is Tensor}


def units_of(model: nn.Module) -> list[Unit]:
    """The sharded units of a model, outer ones before those inside; none when nothing is sharded by FSDP."""
    if not (dist.is_available() and dist.is_initialized()):
        return []
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    wrapped = [part for part in model.modules() if isinstance(part, (FullyShardedDataParallel, FSDPModule))]
    within: dict[nn.Module, set[nn.Module]] = {
        unit: {
            part
            for other in wrapped
            if other is not unit and _inside(other, unit)
            for part in other.modules()
        }
        for unit in wrapped
    }
    return [
        Unit(unit, number, not any(unit in inner for inner in within.values()), within[unit])
        for number, unit in enumerate(wrapped)
    ]


def _inside(module: nn.Module, outer: nn.Module) -> bool:
    return any(part is module for part in outer.modules())


class Gathering:
    """Gathers units for passes that the processes run on their own, in step or not.

    Gathering takes all processes, and they need not ask alike: one may have failed, or need one backward more for its
    images. So they tell each other what they wish for, gather what the first of them asks for, and ask again until
    each has what it wished; one that is done lends a hand until all are (`finish`).

    Args:
        units: The units of the model, `units_of`.
    """

    def __init__(self, units: list[Unit]) -> None:
        self.units = units
        self._held: dict[Unit, ExitStack] = {}
        self._running: list[Unit] = []
        self._of_storage: dict[int, Unit] = {}
        # NCCL exchanges memory of the GPU alone.
        on_gpu = "gloo" not in dist.get_backend() and torch.cuda.is_available()
        self._device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

    @contextmanager
    def open(self) -> Iterator[None]:
        """Let every pass inside the block gather what it needs; all processes enter and leave together."""
        with ExitStack() as stack:
            for unit in self.units:
                stack.enter_context(_hooks_at_rest(unit))
                if unit.outermost:
                    stack.enter_context(unit.gathered())
                stack.enter_context(_forward_through(unit, functools.partial(self._forward, unit)))
            stack.callback(self._let_go)
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack))
            yield

    def finish(self) -> None:
        """Help the other processes to gather until all are done; every process calls it after its passes."""
        self._running.clear()
        self._let_go()
        while self._round(_NOTHING) is not None:
            pass

    def _forward(self, unit: Unit, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What takes the place of a unit's forward."""
        args, kwargs, cast = _in_its_precision(unit, args, kwargs)
        if unit.outermost:
            return cast(forward(*args, **kwargs))
        self._hold(unit)
        self._running.append(unit)
        try:
            return cast(forward(*args, **kwargs))
        finally:
            self._running.remove(unit)
            # A checkpointed unit that computes anew in the backward is needed by what follows there.
            if not in_backward():
                self._let_go()

    def _hold(self, unit: Unit) -> None:
        if unit in self._held:
            return
        self._let_go()
        while self._round(unit.number) != unit.number:
            pass
        if in_backward():
            # Let go when this backward ends, wherever it ends.
            torch.autograd.Variable._execution_engine.queue_callback(self._let_go)

    def _round(self, wish: int) -> int | None:
        """Gather what the first process that wishes for something wants; None when nobody wants anything."""
        own = torch.tensor([wish], device=self._device)
        wishes = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(wishes, own)
        wanted = [number for number in torch.cat(wishes).tolist() if number != _NOTHING]
        if not wanted:
            return None
        unit = self.units[wanted[0]]
        # Gathering is done by all or none, so what is whole here is let go and gathered again.
        keep = unit.number == wish or self._release(unit)
        held = self._held[unit] = ExitStack()
        held.enter_context(unit.gathered())
        if when_gates_are_open():
            held.enter_context(gates_open_in(unit.modules, seed=unit.number))
        self._of_storage.update(dict.fromkeys(unit.storages(), unit))
        if not keep:
            self._release(unit)
        return unit.number

    def _let_go(self) -> None:
        for unit in [unit for unit in self._held if unit not in self._running]:
            self._release(unit)

    def _release(self, unit: Unit) -> bool:
        held = self._held.pop(unit, None)
        if held is None:
            return False
        self._of_storage = {at: owner for at, owner in self._of_storage.items() if owner is not unit}
        held.close()
        return True

    def _pack(self, tensor: Tensor) -> Any:
        if tensor.layout is not torch.strided or type(tensor) not in (Tensor, nn.Parameter):
            return tensor
        unit = self._of_storage.get(tensor.untyped_storage()._cdata)
        # The tensor remains, as FSDP leaves it: its memory is freed when the unit is let go, and filled again.
        return tensor if unit is None else (unit, tensor)

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        unit, tensor = packed
        self._hold(unit)
        return tensor


@contextmanager
def _hooks_at_rest(unit: Unit) -> Iterator[None]:
    """Take the hooks out with which `fully_shard` gathers by itself."""
    tables = [unit.module._forward_pre_hooks, unit.module._forward_hooks]
    own = [
        {key: hook for key, hook in table.items() if hook.__module__.startswith("torch.distributed.fsdp")}
        for table in tables
    ]
    before = [dict(table) for table in tables]
    try:
        for table, hooks in zip(tables, own, strict=True):
            for key in hooks:
                del table[key]
        yield
    finally:
        for table, hooks in zip(tables, before, strict=True):
            table.clear()  # in the order they were called in
            table.update(hooks)


@contextmanager
def _forward_through(unit: Unit, wrapper: Callable[..., Any]) -> Iterator[None]:
    """Another forward for a module: an instance attribute, which hides the method of its class."""
    attributes = vars(unit.module)
    before = {key: value for key, value in attributes.items() if key == "forward"}
    module: Any = unit.module
    inner = module.module.__call__ if _is_version_1(module) else module.forward
    attributes["forward"] = functools.partial(wrapper, inner)
    try:
        yield
    finally:
        attributes.pop("forward", None)
        attributes.update(before)


def _is_version_1(module: nn.Module) -> bool:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return isinstance(module, FullyShardedDataParallel)


def _in_its_precision(
    unit: Unit, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], Callable[[Any], Any]]:
    """Inputs, and what is to be done to outputs, as the mixed-precision policy of `fully_shard` says."""
    module: Any = unit.module
    if _is_version_1(module):
        return args, kwargs, lambda output: output  # gathered in full precision, under the trainer's autocast
    state = module._get_fsdp_state()
    args, kwargs = state._cast_forward_inputs(args, kwargs)
    return args, kwargs, state._cast_output_dtype
