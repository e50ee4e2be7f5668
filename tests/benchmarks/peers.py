"""One explanation beside its peers: time in forwards of the same model, and peak extra memory.

Run `python -m tests.benchmarks.peers [--size 224] [--models vit_tiny_patch16_224 ...] [--batch 1]`. The peers are
installed into an environment of their own (which sees the packages of this one); one that cannot be installed or
run is skipped with a sentence. All methods take turns in one process, so that a noisy machine is noisy for all of
them; the figures are medians of CPU time over the rounds, divided by the median of a plain forward (of torchvision's
model where that is what is explained). Memory is the
growth of the process's peak in a process of its own (Linux alone).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

PEERS = {
    "daam-timm-vit": "0.2.1",
    "torchcam": "0.5.0",
    "grad-cam": "1.5.7",
    "ttach": "0.0.3",
    "captum": "0.9.0",
}
Explain = Callable[[nn.Module, Tensor], Any]


def forward(model: nn.Module, images: Tensor) -> Any:
    with torch.no_grad():
        return model(images)


def floor(model: nn.Module, images: Tensor) -> Any:
    """One forward and one backward over activations alone, fused kernels: what no gradient method can go below."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        tokens: list[Tensor] = []
        hook = model.get_submodule("blocks.0").register_forward_pre_hook(
            lambda _, args: tokens.append(args[0].requires_grad_()) if not tokens else None
        )
        logits = model(images)
        hook.remove()
        return torch.autograd.grad(logits.max(-1).values.sum(), tokens)
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def ours(**form: Any) -> Explain:
    def explain(model: nn.Module, images: Tensor) -> Any:
        from gmar_lightning import gmar

        return gmar(model, images, **form)

    return explain


def materialised_maps(model: nn.Module, images: Tensor) -> Any:
    """Keep every map, ask autograd for its gradient: the textbook way."""
    from tests.helpers.reference import materialised

    maps: list[Tensor] = []
    with materialised(maps):
        score = model(images).max(-1).values.sum()
        return torch.autograd.grad(score, maps)


def daam(model: nn.Module, images: Tensor) -> Any:
    from daam import DAAM  # pyright: ignore[reportMissingImports]

    with DAAM(model) as explain:
        return explain(images)


def grad_cam(model: Any, images: Tensor) -> Any:
    from pytorch_grad_cam import GradCAM  # pyright: ignore[reportMissingImports]

    side = int(images.shape[-1] // model.patch_embed.patch_size[0])

    def on_grid(tokens: Tensor) -> Tensor:
        return tokens[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)

    with GradCAM(model, [model.blocks[-1].norm1], reshape_transform=on_grid) as explain:
        return explain(images, None)


def captum_saliency(model: nn.Module, images: Tensor) -> Any:
    from captum.attr import Saliency  # pyright: ignore[reportMissingImports]

    with torch.no_grad():
        targets = model(images).argmax(-1)
    return Saliency(model).attribute(images.clone().requires_grad_(), targets)


def torchvision_twin(model: Any) -> nn.Module:
    """The torchvision model of the same sizes, which torchcam's LeGrad asks for; made once."""
    from torchvision.models import VisionTransformer

    if not hasattr(model, "_twin"):
        block, patches = model.blocks[0], model.patch_embed
        twin = VisionTransformer(
            image_size=patches.img_size[0],
            patch_size=patches.patch_size[0],
            num_layers=len(model.blocks),
            num_heads=block.attn.num_heads,
            hidden_dim=model.embed_dim,
            mlp_dim=block.mlp.fc1.out_features,
        )
        # Its head starts at zero: random, or there would be no gradient.
        nn.init.normal_(twin.heads[-1].weight, std=0.02)
        object.__setattr__(model, "_twin", twin.eval())
    return model._twin


def twin_forward(model: nn.Module, images: Tensor) -> Any:
    return forward(torchvision_twin(model), images)


def legrad(model: nn.Module, images: Tensor) -> Any:
    from torchcam.methods import LeGrad  # pyright: ignore[reportMissingImports]

    twin: Any = torchvision_twin(model)
    with LeGrad(twin, list(twin.encoder.layers)) as explain:
        scores = twin(images)
        return explain(scores.argmax(-1).tolist(), scores)


ALL_FORMS = ("gradient", "paper", "flow", "rollout", "last_layer")
_TWIN = "plain forward, torchvision's model"
METHODS: dict[str, tuple[Explain, str]] = {
    "plain forward": (forward, ""),
    _TWIN: (twin_forward, "torchvision"),
    "floor: forward + activation backward": (floor, ""),
    "gmar, L1, one form": (ours(), ""),
    "the callback's explanation (five forms, signals, head maps)": (
        ours(rollout=ALL_FORMS, signals=True, head_maps=True),
        "",
    ),
    "materialised maps, autograd": (materialised_maps, ""),
    "daam-timm-vit": (daam, "daam-timm-vit"),
    "torchcam LeGrad, all layers": (legrad, "torchcam"),
    "grad-cam (one layer, no heads)": (grad_cam, "grad-cam"),
    "captum saliency (pixels, no heads)": (captum_saliency, "captum"),
}


def build(name: str, size: int) -> nn.Module:
    import timm

    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, img_size=size).eval()


def seconds(name: str, size: int, batch: int, rounds: int) -> dict[str, float | str]:
    """Median CPU seconds of each method, all of them taking turns."""
    model, images = build(name, size), torch.randn(batch, 3, size, size)
    spent: dict[str, list[float]] = {method: [] for method in METHODS}
    broken: dict[str, str] = {}
    for turn in range(rounds + 1):
        for method, (explain, _) in METHODS.items():
            if method in broken:
                continue
            try:
                start = time.process_time()
                explain(model, images)
                if turn:  # the first round warms up
                    spent[method].append(time.process_time() - start)
            except Exception as error:  # a peer's failure is a result
                broken[method] = f"{type(error).__name__}: {error}".splitlines()[0][:60]
            for each in (model, torchvision_twin(model)):
                for parameter in each.parameters():
                    parameter.grad = None
                each.eval()
    return {m: broken.get(m) or statistics.median(spent[m]) for m in METHODS}


def peak_megabytes(name: str, size: int, batch: int, method: str) -> float:
    """Growth of the process's peak memory; to be asked in a process of its own."""
    model, images = build(name, size), torch.randn(batch, 3, size, size)
    explain = METHODS[method][0]
    forward(torchvision_twin(model) if explain in (legrad, twin_forward) else model, images[:1])
    # A child inherits its parent's peak; 5 resets it to what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak()
    explain(model, images)
    return (_peak() - before) / 1024


def _peak() -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def version_of(package: str) -> str:
    try:
        return metadata.version(package) if package else ""
    except metadata.PackageNotFoundError:
        return "not installed"


def own_environment(folder: Path) -> Path:
    """An environment with the peers that sees this one's packages; returns its Python."""
    venv.create(folder, with_pip=False)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "parent.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    python = folder / "bin" / "python"
    for package, version in PEERS.items():
        # Without dependencies: torch and torchvision are there, and theirs must not replace them.
        command = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps"]
        done = subprocess.run([*command, f"{package}=={version}"], capture_output=True, text=True)
        if done.returncode:
            print(f"{package} {version} cannot be installed here and is left out")
    return python


def table(models: list[str], size: int, batch: int, rounds: int) -> None:
    torch.set_num_threads(1)
    for name in models:
        found = seconds(name, size, batch, rounds)
        unit = found["plain forward"]
        assert isinstance(unit, float)
        print(f"\n{name}, {size} px, batch {batch}, one thread; a forward takes {unit * 1000:.0f} ms\n")
        print("| method | version | forwards | peak extra MB |\n|---|---|---|---|")
        for method, (_, package) in METHODS.items():
            value = found[method]
            if isinstance(value, str):
                print(f"| {method} | {version_of(package)} | skipped: {value} | |")
                continue
            command = [sys.executable, "-m", "tests.benchmarks.peers", "--memory", method, "--models", name]
            command += ["--size", str(size), "--batch", str(batch)]
            memory = subprocess.run(command, capture_output=True, text=True).stdout.strip() or "?"
            own = found[_TWIN] if package in ("torchcam", "torchvision") else unit
            print(f"| {method} | {version_of(package)} | {value / float(own):.2f} | {memory} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["vit_tiny_patch16_224", "vit_small_patch16_224"])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.memory:
        torch.set_num_threads(1)
        print(f"{peak_megabytes(given.models[0], given.size, given.batch, given.memory):.0f}")
    elif given.inside:
        table(given.models, given.size, given.batch, given.rounds)
    else:
        with tempfile.TemporaryDirectory() as folder:
            python = own_environment(Path(folder))
            subprocess.run(
                [str(python), "-m", "tests.benchmarks.peers", "--inside", *sys.argv[1:]], check=True
            )


if __name__ == "__main__":
    main()
