"""Heatmaps for image files, from a checkpoint that `train.py` wrote."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gmar_lightning.explain.errors import UnsupportedModelError
from gmar_lightning.explain.gmar import GMARResult, gmar
from gmar_lightning.explain.importance import Norm
from gmar_lightning.explain.output import Output, predicted
from gmar_lightning.explain.rollout import Rollout
from gmar_lightning.monitor.photographs import read_photograph
from gmar_lightning.show.grids import contribution_grid, importance_grid
from gmar_lightning.show.head_pictures import all_heads_sheet
from gmar_lightning.show.render import contact_sheet, enlarged, on_one_sheet, overlay
from gmar_lightning.show.terminal import plain, progress
from gmar_lightning.training.model import Classifier
from gmar_lightning.training.weights import refuse_code

# A photograph is never resized to more than this.
_MOST_PIXELS = 64 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `gmar explain`."""
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    parser.add_argument("--checkpoint", required=True, type=Path, help="a checkpoint that train.py wrote")
    parser.add_argument("--out", type=Path, default=Path("heatmaps"), help="folder for the pictures")
    parser.add_argument(
        "--target", default="predicted", help="class name or index; default: the predicted class"
    )
    parser.add_argument("--norm", choices=get_args(Norm), default="l1")
    parser.add_argument("--rollout", choices=get_args(Rollout), default="gradient")
    parser.add_argument(
        "--output",
        choices=get_args(Output),
        default="logits",
        help="what the model returns for its classes; decides which probability is printed (default: logits)",
    )
    parser.add_argument(
        "--heads",
        action="store_true",
        help="also draw <name>_heads.png: contribution and importance of all heads, and what each one attends to",
    )


def run(arguments: argparse.Namespace) -> int:
    """Explain each file, write `<name>_gmar.jpg`, and say what was predicted.

    Args:
        arguments: As parsed with `add_arguments`.

    Returns:
        Exit code: 0 when all files were explained, 1 when some were not, 2 when none could be.
    """
    try:
        refuse_code(arguments.checkpoint)
        model = Classifier.load_from_checkpoint(arguments.checkpoint, map_location="cpu").eval()
        target = _class_index(arguments.target, model.class_names)
    except Exception as error:  # a file may be broken in any way
        print(plain(f"{arguments.checkpoint}: cannot be used: {error}"), file=sys.stderr)
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    paths, done = _distinct_names(arguments.images), 0
    for path, name in progress(paths, len(paths), "explaining"):
        try:
            photograph = _read(path, model.image_size)
        except (OSError, ValueError, MemoryError) as error:
            print(plain(f"{path}: skipped, cannot be read: {error}"), file=sys.stderr)
            continue
        try:
            result = gmar(
                model,
                _normalised(photograph, model)[None],
                None if target is None else torch.tensor([target]),
                norm=arguments.norm,
                rollout=arguments.rollout,
                head_maps=arguments.heads,
                output=arguments.output,
            )
        except (UnsupportedModelError, ValueError) as error:
            print(plain(f"{arguments.checkpoint}: {error}"), file=sys.stderr)
            return 2
        _write(arguments.out / f"{name}_gmar.jpg", photograph, result, with_heads=arguments.heads)
        print(plain(f"{path}: {_said(result, model.class_names)} -> {arguments.out / f'{name}_gmar.jpg'}"))
        done += 1
    return 0 if done == len(paths) else 1 if done else 2


def _class_index(target: str, names: Sequence[str] | None) -> int | None:
    if target == "predicted":
        return None
    if names is not None and target in names:
        return list(names).index(target)
    if target.isdigit():
        return int(target)
    known = ", ".join(names) if names else "no names, give an index"
    raise ValueError(f"--target {target!r} is no class of this model: {known}")


def _distinct_names(paths: Sequence[Path]) -> list[tuple[Path, str]]:
    """Each file with a name for its picture; files of one stem in several folders stay apart."""
    seen: dict[str, int] = {}

    def name(path: Path) -> str:
        seen[path.stem] = seen.get(path.stem, 0) + 1
        return path.stem if seen[path.stem] == 1 else f"{path.stem}_{seen[path.stem]}"

    return [(path, name(path)) for path in paths]


def _read(path: Path, size: int) -> np.ndarray:
    """The photograph as validation sees it: shorter side resized, centre cropped."""
    rgb = read_photograph(path)
    factor = size / min(rgb.size)
    width, height = (max(size, round(side * factor)) for side in rgb.size)
    left, top = (width - size) // 2, (height - size) // 2
    if width * height > _MOST_PIXELS:  # a strip: only its middle is resized
        box = [side / factor for side in (left, top, left + size, top + size)]
        middle = (box[0], box[1], min(box[2], rgb.width), min(box[3], rgb.height))
        return np.asarray(rgb.resize((size, size), Image.Resampling.BICUBIC, box=middle))
    resized = rgb.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def _normalised(photograph: np.ndarray, model: Classifier) -> Tensor:
    image = torch.from_numpy(photograph.copy()).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (model.mean, model.std))
    return (image - mean) / std


def _write(path: Path, photograph: np.ndarray, result: GMARResult, with_heads: bool) -> None:
    if result.heatmaps is None:
        raise UnsupportedModelError(f"no heatmap can be drawn, {result.scope}")
    image = enlarged(photograph)
    heat = overlay(image, result.heatmaps[0].numpy())
    Image.fromarray(contact_sheet([image, heat], columns=2)).save(path, quality=92)
    if with_heads:
        sheet = _heads_sheet(image, result)
        Image.fromarray(sheet).save(path.with_name(path.stem.removesuffix("_gmar") + "_heads.png"))


def _heads_sheet(image: np.ndarray, result: GMARResult) -> np.ndarray:
    """Contribution and importance of all heads, and below what each of them attends to."""
    grids = [
        contribution_grid(result.contribution[0].abs().numpy(), layers=result.layers),
        importance_grid(result.head_weights[0].numpy(), layers=result.layers),
    ]
    assert result.head_maps is not None, "they were asked for"
    return on_one_sheet([grids, [all_heads_sheet(image, result.head_maps[0].numpy(), result.layers)]])


def _said(result: GMARResult, names: Sequence[str] | None) -> str:
    assert result.logits is not None
    assert result.targets is not None
    assert result.probabilities is not None, "--output says what the logits are"
    chances = result.probabilities[0]

    def one(index: int) -> str:
        name = names[index] if names is not None and index < len(names) else str(index)
        return f"{name} {float(chances[index]):.2f}"

    best, explained = int(predicted(result.logits, result.output)[0]), int(result.targets[0])
    return one(best) + ("" if best == explained else f", explained for {one(explained)}")
