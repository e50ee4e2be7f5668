"""Memory and traffic of a probe under FSDP: `python -m tests.benchmarks.sharded [--processes 2]`.

Counted in real processes (gloo, CPU): the bytes of whole weights alive at every operation of a probe, and gathers.
Then worked out from counts for a large model on many devices, with the assumptions printed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import timm
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from gmar_lightning.monitor.explanation import explain_together
from gmar_lightning.monitor.probe import ProbeBatch
from gmar_lightning.monitor.processes import gathered
from gmar_lightning.monitor.settings import ProbeSettings
from gmar_lightning.monitor.sharded import Unit

MIB = 2**20


class WholeBytes(TorchDispatchMode):
    """The largest number of bytes of whole weights at any operation."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.most = model, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with _disable_current_modes():
            weights = [w for part in self.model.modules() for w in part._parameters.values() if w is not None]
            plain = [w.untyped_storage() for w in weights if not hasattr(w, "to_local")]
            whole = {storage._cdata: storage.nbytes() for storage in plain}
            self.most = max(self.most, sum(whole.values()))
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_gathers() -> Iterator[list[int]]:
    """The numbers of the units that are gathered inside the block."""
    seen: list[int] = []
    original = Unit.gathered

    def gathered_and_noted(unit: Unit) -> Any:
        seen.append(unit.number)
        return original(unit)

    Unit.gathered = gathered_and_noted  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        Unit.gathered = original  # type: ignore[method-assign]


def measure() -> None:
    """What one process of several counts."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=10).eval()
    total = sum(p.numel() for p in model.parameters()) * 4
    block = sum(p.numel() for p in model.blocks[0].parameters()) * 4
    outer = total - len(model.blocks) * block
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh)
    probe = ProbeBatch(torch.randn(8, 3, 64, 64))
    rows = []
    for _ in range(2):  # the first looks at the model as well
        with WholeBytes(model) as watch, counted_gathers() as gathers, gathered(model):
            explain_together(model, probe, ProbeSettings())
        rows.append((watch.most, len(gathers)))
    if dist.get_rank() == 0:
        print(
            f"| {dist.get_world_size()} | {total / MIB:.1f} | {rows[0][0] / MIB:.2f} | {rows[1][0] / MIB:.2f} "
            f"| {(outer + block) / MIB:.2f} | {rows[0][1]} | {rows[1][1]} |",
            flush=True,
        )
    dist.barrier()
    dist.destroy_process_group()


def worked_out(name: str, devices: int, images: int, itemsize: int = 4) -> None:
    """Memory and traffic of a probe of a large model, from counted weights."""
    with torch.device("meta"):
        model = timm.create_model(name)
    weights = sum(p.numel() for p in model.parameters())
    block = sum(p.numel() for p in model.blocks[0].parameters())
    outer = weights - len(model.blocks) * block
    tokens, width = model.patch_embed.num_patches + 1, model.embed_dim
    each = -(-images // devices)
    # One forward and an activation backward, 2 + 2 operations for each weight and token; attention 4 + 8 N^2 d.
    work = each * (4 * weights * tokens + len(model.blocks) * 12 * tokens**2 * width)
    gathers = itemsize * (outer + 2 * len(model.blocks) * block)
    print(f"\n{name}, {devices} devices, {images} images ({each} on a device), {itemsize} bytes a weight\n")
    print("| | whole model | unit by unit |\n|---|---|---|")
    unit = itemsize * (outer + block) / MIB
    print(f"| weights alive on a device, MiB | {itemsize * weights / MIB:.0f} | {unit:.0f} |")
    print(f"| received by a device in a probe, MiB | {itemsize * weights / MIB:.0f} | {gathers / MIB:.0f} |")
    print(f"| gathers | {len(model.blocks) + 1} | {2 * len(model.blocks) + 1} |")
    print(f"| operations of a device, TFLOP | {work / 1e12:.2f} | {work / 1e12:.2f} |")


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    given = parser.parse_args()
    if "RANK" in os.environ:
        measure()
        return
    print(
        "| processes | model, MiB | most whole at once, first probe | later probes | outer unit + one block "
        "| gathers, first probe | later probes |\n|---|---|---|---|---|---|---|",
        flush=True,
    )
    for number, world in enumerate(given.processes):
        settings = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29611 + number)}
        command = [sys.executable, "-m", "tests.benchmarks.sharded"]
        each = [{**os.environ, **settings, "RANK": str(rank)} for rank in range(world)]
        for process in [subprocess.Popen(command, env=environment) for environment in each]:
            process.wait()
    worked_out("vit_giant_patch14_224", 64, 32)
    worked_out("vit_giant_patch14_224", 64, 64)


if __name__ == "__main__":
    main()
