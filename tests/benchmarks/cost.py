"""What an explanation costs beside the materialised reference: `python -m tests.benchmarks.cost`.

Operations are counted exactly; memory is the high-water mark of a fresh process (on a CPU) or of the allocator
(on a GPU). The reference holds every attention map, takes autograd gradients at all of them, and multiplies full
matrices.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gmar_lightning import gmar
from gmar_lightning.explain.rollout import Rollout
from tests.helpers.reference import reference

MIB = 2**20


def vit(name: str, size: int, **options: object) -> nn.Module:
    """A timm classifier with random weights for images of `size` pixels."""
    torch.manual_seed(0)
    return timm.create_model(name, img_size=size, num_classes=10, **options).eval()


def _fused_forward(q: Any, k: Any, v: Any, *rest: Any, **named: Any) -> int:
    """Two products, `q k^T` and `A v`."""
    batch, heads, queries, width = q
    return 2 * batch * heads * queries * k[-2] * (width + v[-1])


def _fused_backward(grad: Any, q: Any, k: Any, v: Any, *rest: Any, **named: Any) -> int:
    """Five products: the map again, then dA, dQ, dK and dV."""
    batch, heads, queries, width = q
    return 2 * batch * heads * queries * k[-2] * (3 * width + 2 * v[-1])


# The counter of torch knows the fused kernels of a GPU, and counts those of a CPU as nothing.
_ON_CPU: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _fused_forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _fused_backward,
}


def operations(run: Callable[[], object]) -> int:
    """Exact count of the multiplications and additions of matrix products, convolutions and attention."""
    with FlopCounterMode(display=False, custom_mapping=_ON_CPU) as counter:
        run()
    return counter.get_total_flops()


def operation_row(name: str, size: int, beside: bool = True) -> dict[str, float]:
    """Cost of one image in forward passes.

    L1, L2, what a probe asks for (all forms, signals, head maps) and, `beside` them, the materialised reference.
    """
    return _in_forwards(_counted(name, size, beside))


def operation_row_by_depth(name: str, size: int, depth: int = 12) -> dict[str, float]:
    """As `operation_row`, from models of two and three layers: every layer between the outer two costs the same."""
    two, three = (_counted(name, size, False, depth=layers) for layers in (2, 3))
    return _in_forwards({what: two[what] + (depth - 2) * (three[what] - two[what]) for what in two})


def _counted(name: str, size: int, beside: bool, **options: int) -> dict[str, int]:
    model, image = vit(name, size, **options), torch.randn(1, 3, size, size)
    with torch.no_grad():
        counted = {"forward": operations(lambda: model(image))}
    gmar(model, image)  # the first call looks at the model once; later ones do not
    for norm in ("l1", "l2"):
        counted[norm] = operations(functools.partial(gmar, model, image, norm=norm))
    counted["probe"] = operations(
        lambda: gmar(model, image, rollout=get_args(Rollout), signals=True, head_maps=True)
    )
    if beside:
        grid = (size // 16, size // 16)
        counted["reference"] = operations(lambda: reference(model, image, grid=grid))
    return counted


def _in_forwards(counted: dict[str, int]) -> dict[str, float]:
    return {what: count / counted["forward"] for what, count in counted.items() if what != "forward"}


def explain(method: str, model: nn.Module, images: Tensor) -> None:
    """Run one method once."""
    if method == "forward":
        with torch.no_grad():
            model(images)
    elif method == "training":
        model(images).sum().backward()
    elif method == "reference":
        reference(model, images, grid=(images.shape[-2] // 16, images.shape[-1] // 16))
    else:
        gmar(model, images, norm="l2" if method == "l2" else "l1")


def resident_growth(method: str, name: str, size: int, depth: int) -> float:
    """MiB that one explanation adds to the high-water mark of this process, which must be fresh."""
    torch.set_num_threads(1)
    model, images = vit(name, size, depth=depth), torch.randn(1, 3, size, size)
    explain("l1", vit(name, 32, depth=1), torch.randn(1, 3, 32, 32))  # imports and buffers of the kernels
    before = high_water()
    explain(method, model, images)
    return (high_water() - before) / 1024


def high_water() -> int:
    """Most KiB that this program had resident: `ru_maxrss` would begin at the peak of the process that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def memory(method: str, name: str = "vit_tiny_patch16_224", size: int = 1024, depth: int = 12) -> float:
    """Peak extra memory of one explanation in MiB, measured in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.cost", "--one", method, name, str(size), str(depth)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    return float(json.loads(done.stdout.splitlines()[-1]))


def cuda_row(name: str, size: int, batch: int, methods: tuple[str, ...]) -> None:
    """Print peak memory and time on the GPU in bfloat16, in MiB and forward passes."""
    model = vit(name, size).cuda().bfloat16()
    images = torch.randn(batch, 3, size, size, device="cuda", dtype=torch.bfloat16)
    seconds: dict[str, float] = {}
    for method in ("forward", *methods):
        try:
            explain(method, model, images)
        except torch.OutOfMemoryError:
            print(f"{name} {size} px batch {batch}, {method}: out of memory", flush=True)
            continue
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, started = torch.cuda.memory_allocated(), time.perf_counter()
        for _ in range(3):
            explain(method, model, images)
        torch.cuda.synchronize()
        seconds[method] = (time.perf_counter() - started) / 3
        peak = (torch.cuda.max_memory_allocated() - before) / MIB
        model.zero_grad()
        print(
            f"{name} {size} px batch {batch}, {method}: {peak:.0f} MiB, {1e3 * seconds[method]:.1f} ms, "
            f"{seconds[method] / seconds['forward']:.2f} forwards",
            flush=True,
        )


def main() -> None:
    """Print every row."""
    if sys.argv[1:2] == ["--one"]:
        method, name, size, depth = sys.argv[2:]
        print(json.dumps(resident_growth(method, name, int(size), int(depth))))
        return
    for name, size in (("vit_base_patch16_224", 224), ("vit_tiny_patch16_224", 512)):
        row = operation_row(name, size)
        print(
            f"operations in forwards, {name} {size} px: " + ", ".join(f"{k} {v:.3f}" for k, v in row.items())
        )
    for depth, methods in (
        (12, ("forward", "training", "l1", "l2", "reference")),
        (24, ("training", "l1", "l2")),
    ):
        row = {method: memory(method, depth=depth) for method in methods}
        shown = ", ".join(f"{method} {value:.0f}" for method, value in row.items())
        print(f"peak extra memory, ViT-Ti/16 1024 px, {depth} layers, MiB: {shown}", flush=True)
    if not torch.cuda.is_available():
        print("no GPU here: its rows are left out")
        return
    cuda_row("vit_base_patch16_224", 224, 64, ("l1", "l2", "reference"))
    for batch in (1, 4):
        cuda_row("vit_large_patch16_224", 1024, batch, ("l1", "l2", "reference"))


if __name__ == "__main__":
    main()
