"""`gmar doctor MODEL`: whether a model can be explained, what would be shown, and what a probe of it costs."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from gmar_lightning.explain.check import check
from gmar_lightning.explain.gmar import gmar
from gmar_lightning.training.model import Classifier


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `gmar doctor`."""
    parser.add_argument(
        "model", metavar="MODEL", help="a name in timm, a checkpoint of train.py, or package.module:factory"
    )
    parser.add_argument("--image-size", type=int, help="side in pixels; default: the model's own, else 224")
    parser.add_argument("--module", help="dotted path of the classifier inside the model")
    parser.add_argument("--num-images", type=int, default=32, help="images of a probe (default 32)")
    parser.add_argument("--json", action="store_true", help="print JSON instead")


def run(arguments: argparse.Namespace) -> int:
    """Print the verdict and the cost.

    Returns:
        Exit code: 0 when the model can be explained, 1 when it is refused, 2 when there is no such model.
    """
    try:
        model, size = _loaded(arguments.model)
        images = torch.randn(
            2, 3, *[arguments.image_size or size] * 2, generator=torch.Generator().manual_seed(0)
        )
        verdict = check(model, images, module=arguments.module)
    except Exception as error:
        # A factory of the user's own may raise anything; whoever typed the command needs the reason.
        print(f"{arguments.model}: cannot be used: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    cost = _cost(model, images, arguments.module, arguments.num_images) if verdict.supported else {}
    if arguments.json:
        print(json.dumps({**asdict(verdict), **cost}, indent=1))
    else:
        print(verdict)
        if cost:
            print(
                f"  cost     {cost['forwards']:.2f} forwards per image; about {cost['memory_mib']:.0f} MiB of "
                f"activations for {arguments.num_images} images (micro_batch_size bounds it)"
            )
    return 0 if verdict.supported else 1


def _loaded(name: str) -> tuple[nn.Module, int]:
    if Path(name).is_file():
        model = Classifier.load_from_checkpoint(name, map_location="cpu").eval()
        return model, model.image_size
    module, colon, factory = name.partition(":")
    if colon:
        sys.path.insert(0, "")  # as `python -m` does
        return getattr(importlib.import_module(module), factory)().eval(), 224
    built: Any = timm.create_model(name, pretrained=False).eval()
    return built, built.pretrained_cfg["input_size"][-1]


def _cost(model: nn.Module, images: Tensor, module: str | None, count: int) -> dict[str, float]:
    """Operations of a probe in forwards of the model, and what its graph keeps of so many images, in MiB."""
    one = images[:1]
    with FlopCounterMode(display=False) as probe:
        gmar(model, one, module=module)  # the second time: the trial of a new model was paid by the verdict
    kept: dict[int, int] = {}
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with FlopCounterMode(display=False) as forward, saved_tensors_hooks(note, lambda tensor: tensor):
        output = model(one)
    del output
    return {
        "forwards": probe.get_total_flops() / max(1, forward.get_total_flops()),
        "memory_mib": sum(kept.values()) * count / 2**20,
    }
