"""What tests/test_distributed.py runs in two processes: `python -m tests.helpers.many_processes FOLDER`.

Both are started with the environment that Lightning gives to the processes it starts for a user's script, so that
they import side by side.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import json
import random
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gmar_lightning.explain.gmar import gmar
from gmar_lightning.monitor.explanation import Explanation, explain_together
from gmar_lightning.monitor.probe import ProbeBatch
from gmar_lightning.monitor.processes import ProbeError, gathered
from gmar_lightning.monitor.settings import ProbeSettings
from tests.helpers.tiny import CLASSES, Classifier, digest, images_of, loaders, run_and_digest, vit, watcher


class BatchNormHead(Classifier):
    def __init__(self):
        super().__init__(drop_rate=0.1)
        self.net.head = nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, CLASSES))


class UnusedPart(Classifier):
    def __init__(self):
        super().__init__(drop_rate=0.1)
        self.unused = nn.Linear(3, 3)


class ByFullyShard(Classifier):
    """Shards its blocks, as a user of Lightning's `model_parallel` strategy writes it."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import FSDPModule, fully_shard

        if not isinstance(self.net, FSDPModule):
            for part in (*self.net.blocks, self.net):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])


class FailsOnOne(Classifier):
    """From the second probe on, every other probe fails on process 1 alone."""

    def __init__(self):
        super().__init__(drop_rate=0.1)
        probes = (ctypes.c_int * 1)()  # memory that a probe does not put back

        def fail(module: nn.Module, inputs: Any) -> None:
            if torch.is_grad_enabled() and not module.training:
                probes[0] += 1
                if dist.get_rank() == 1 and probes[0] % 2 == 0:
                    raise RuntimeError("only here")

        self.net.blocks[1].register_forward_pre_hook(fail)


DDP_ROWS: dict[str, tuple[Callable[[], Classifier], dict[str, Any], dict[str, Any]]] = {
    "plain": (Classifier, {}, {}),
    "accumulation": (Classifier, {"accumulate_grad_batches": 3}, {}),
    "unused parameters": (UnusedPart, {"strategy": "ddp_find_unused_parameters_true"}, {}),
    "uneven probe": (Classifier, {}, {"num_images": 7, "micro_batch_size": 2}),
    "BatchNorm": (BatchNormHead, {}, {}),
    "failure on one process": (FailsOnOne, {}, {"on_error": "warn"}),
    "an interval that adapts": (Classifier, {"max_epochs": 6}, {"every_n_train_steps": "auto"}),
    "read off steps": (Classifier, {}, {"read": "step"}),
}


_without: dict[Any, dict[str, str]] = {}


def train(name: str, folder: Path) -> dict[str, Any]:
    """A row with the callback and without it, as digests."""
    module, trainer, changes = DDP_ROWS[name]
    # The faithfulness of the maps is measured in the first row, and where the processes have unequal parts.
    changes = changes if name in ("plain", "uneven probe") else {"faithfulness_every": None, **changes}
    settings = {"strategy": "ddp", "devices": 2, "max_epochs": 2, **trainer}
    place = folder / name.replace(" ", "_")
    made: list[Classifier] = []
    at_first: dict[str, Any] = {}

    def kept() -> Classifier:
        made.append(module())
        at_first.update(copy.deepcopy(made[-1].state_dict()))
        return made[-1]

    with_it, _, _ = run_and_digest(
        place, kept, loaders, lambda: [watcher(place, **{"every_n_train_steps": 2, **changes})], **settings
    )
    if dist.get_rank() == 0:
        torch.save(made[0].state_dict(), place / "last.pt")
        torch.save(at_first, place / "first.pt")
    # Rows that train alike have the same run to be compared with.
    alike = (module, repr(sorted(settings.items())))
    if alike not in _without:
        _without[alike] = run_and_digest(place, module, loaders, **settings)[0]
    return {"with": with_it, "without": _without[alike], "first batch": made[0].order.indices[:4]}


def train_sharded(folder: Path) -> dict[str, Any]:
    """A run under Lightning's strategy for FSDP 2, with the callback and without it."""

    def run(*callbacks: Any) -> dict[str, str]:
        strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=False)
        settings: dict[str, Any] = {"strategy": strategy, "devices": 2, "max_epochs": 1}
        module = lambda: ByFullyShard(drop_rate=0.1)  # noqa: E731
        return run_and_digest(folder, module, loaders, lambda: list(callbacks), **settings)[0]

    return {"with": run(watcher(folder, every_n_train_steps=2, faithfulness_every=None)), "without": run()}


def explained(
    model: nn.Module, probe: ProbeBatch, explain: Callable[..., Any] = gmar, **settings: Any
) -> Explanation:
    """The probe images explained as a probe does it: weights gathered once, images shared out."""
    with gathered(model):
        return explain_together(model, probe, ProbeSettings(**settings), explain)


def shard(model: nn.Module, kind: str) -> nn.Module:
    """The model spread over the two processes."""
    if kind == "fully_shard":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    policy = ModuleWrapPolicy({type(model.blocks[0])})
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), auto_wrap_policy=policy)


class Whole(TorchDispatchMode):
    """The largest number of inner units whose weights were whole at the same time, seen at every operation."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.blocks: list[Any] = [part for part in model.modules() if type(part).__name__.endswith("Block")]
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch.utils._python_dispatch._disable_current_modes():
            self.most = max(self.most, sum(self._is_whole(block) for block in self.blocks))
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _is_whole(block: Any) -> bool:
        weight: Any = block.mlp.fc1._parameters.get("weight", getattr(block.mlp.fc1, "weight", None))
        plain = not hasattr(weight, "to_local") and weight.ndim == 2
        return plain and weight.untyped_storage().nbytes() >= weight.numel() * weight.element_size()


def sharded(kind: str) -> dict[str, Any]:
    """One measurement of a sharded model, beside the same model whole."""
    torch.manual_seed(3)
    whole = vit(depth=3).eval()
    model = shard(copy.deepcopy(whole), kind)
    probe = ProbeBatch(images_of(5), torch.arange(5) % CLASSES)
    with Whole(model) as watch:
        found = explained(model, probe, target="label", micro_batch_size=2)
    alone = gmar(whole, probe.images, probe.labels)
    return {
        "sharded": found.signals()["importance"].tolist(),
        "whole": alone.importance.mean(0).tolist(),
        "maps": abs(found.maps["gradient"] - alone.heatmaps.numpy()).max().item(),
        "layers": [list(found.layers), list(alone.layers)],
        "most whole": watch.most,
        "unequal": _out_of_step(model, probe, found),
        "failure": _fails_inside(model, probe),
        "checkpointed": _checkpointed(model, probe, found),
        "closed gate": _closed_gate(kind),
    }


def _out_of_step(model: nn.Module, probe: ProbeBatch, found: Explanation) -> float:
    """Process 1 runs twice as many passes as process 0."""

    def more(*args: Any, **settings: Any) -> Any:
        if dist.get_rank() == 1:
            gmar(*args, **{**settings, "micro_batch_size": 1})
        return gmar(*args, **settings)

    again = explained(model, probe, more, target="label")
    return abs(again.importance - found.importance).max().item()


def _fails_inside(model: nn.Module, probe: ProbeBatch) -> str:
    """Process 1 fails in the middle of its forward."""

    def fail(*args: Any) -> None:
        if dist.get_rank() == 1:
            raise RuntimeError("only here")

    block = [part for part in model.modules() if type(part).__name__.endswith("Block")][1]
    handle = block.register_forward_pre_hook(fail)
    try:
        explained(model, probe, target="label")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        handle.remove()
    return "nothing"


def _checkpointed(model: Any, probe: ProbeBatch, found: Explanation) -> float:
    """Layers that are computed anew in the backward."""
    inner = getattr(model, "module", model)
    inner.set_grad_checkpointing(True)
    again = explained(model, probe, target="label")
    inner.set_grad_checkpointing(False)
    return abs(again.importance - found.importance).max().item()


def _closed_gate(kind: str) -> str:
    """Tokens are mixed behind a gate that is still zero, inside a block."""
    torch.manual_seed(3)
    model = vit().eval()
    model.blocks[0].mlp = Gated(model.blocks[0].mlp)
    try:
        explained(shard(model, kind), ProbeBatch(images_of(4)))
    except Exception as error:
        return str(error)
    return "nothing"


class Gated(nn.Module):
    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.mlp, self.gate = mlp, nn.Parameter(torch.zeros(1))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.mlp(tokens) + self.gate * tokens.cumsum(1)


def in_half_precision() -> list[Any]:
    """`fully_shard` with weights and activations of the blocks in bfloat16."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.manual_seed(3)
    whole, probe = vit().eval(), ProbeBatch(images_of(4))
    model, mesh = copy.deepcopy(whole), init_device_mesh("cpu", (2,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    found = explained(model, probe)
    alone = gmar(whole.bfloat16(), probe.images)
    return [found.signals()["importance"].tolist(), alone.importance.mean(0).tolist()]


def split_between_processes() -> str:
    """A layer cut up by tensor parallelism."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = vit().eval()
    plan: Any = {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()}
    parallelize_module(model.blocks[0].mlp, init_device_mesh("cpu", (2,)), plan)
    try:
        explained(model, ProbeBatch(images_of(4)))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def sharded_training(kind: str, probing: bool) -> str:
    """Train a sharded model for four steps, with or without a measurement before each and a failing one."""
    torch.manual_seed(3)
    model = shard(vit(drop_rate=0.1), kind)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    probe = ProbeBatch(images_of(5), torch.arange(5) % CLASSES)
    for step in range(4):
        if probing:
            explained(model, probe)
            with contextlib.suppress(ValueError, ProbeError):
                explained(model, probe, fails_on_one)
        images = images_of(4, seed=10 * step + dist.get_rank())
        torch.nn.functional.cross_entropy(model(images), torch.arange(4)).backward()
        optimizer.step()
        optimizer.zero_grad()
    parts = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
    return digest([parts, torch.get_rng_state()])


def fails_on_one(*args: Any, **settings: Any) -> Any:
    """Explains, and then raises on process 1."""
    result = gmar(*args, **settings)
    if dist.get_rank() == 1:
        raise ValueError("only here")
    return result


def failing_measure(kind: str) -> dict[str, Any]:
    """Process 1 fails while process 0 is slow; what does each of them get, and when?"""
    rank = dist.get_rank()
    probe = ProbeBatch(images_of(4))
    model, errors = vit().eval(), {"error": ValueError("bad"), "memory": MemoryError("full")}

    def explain(*args: Any, **settings: Any) -> Any:
        if rank == 1 and (kind == "error" or settings["micro_batch_size"] > 1):
            raise errors[kind]
        time.sleep(random.random())
        return gmar(*args, **settings)

    try:
        found = explained(model, probe, explain)
    except Exception as error:
        return {
            "raised": type(error).__name__,
            "said": str(error),
            "refused": getattr(error, "refused", None),
        }
    return {"micro_batch_size": found.micro_batch_size, "halved": found.out_of_memory}


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    results: dict[str, Any] = {name: train(name, folder) for name in DDP_ROWS}
    results["model_parallel"] = train_sharded(folder / "model_parallel")
    rank = dist.get_rank()
    for kind in ("fully_shard", "FullyShardedDataParallel"):
        results[kind] = sharded(kind)
        results[f"training {kind}"] = [sharded_training(kind, probing) for probing in (True, False)]
    results["half precision"] = in_half_precision()
    results["tensor parallel"] = split_between_processes()
    for kind in ("error", "memory"):
        results[kind] = failing_measure(kind)
    (folder / f"results_{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
