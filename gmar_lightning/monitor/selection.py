"""Probe images that people choose: a folder of files, indices of the validation set, the hardest, the mistaken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gmar_lightning.explain.inputs import logits_of
from gmar_lightning.explain.output import kind_of, loss_of, predicted
from gmar_lightning.monitor.photographs import read_photograph
from gmar_lightning.monitor.probe import ProbeBatch

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
# Images that "hardest" and "misclassified" look at, spread evenly over the validation set. One forward each, once.
CANDIDATES = 256
_BATCH = 32


def checked_choice(choice: Any) -> Path | Literal["hardest", "misclassified"] | list[int]:
    """What `probe_images` may be.

    Raises:
        ValueError: It is none of them; the message says what it may be.
    """
    if isinstance(choice, str) and choice in ("hardest", "misclassified"):
        return "hardest" if choice == "hardest" else "misclassified"
    if isinstance(choice, (str, PathLike)):
        folder = Path(choice)
        if folder.is_dir():
            return folder
        raise ValueError(
            f'probe_images={str(choice)!r} is no folder; give a folder, "hardest", "misclassified", or a list of '
            "indices of the validation set"
        )
    indices = choice.tolist() if isinstance(choice, (Tensor, np.ndarray)) else choice
    whole = isinstance(indices, Sequence) and all(
        isinstance(index, (int, np.integer)) and not isinstance(index, bool) and index >= 0
        for index in indices
    )
    if not whole or not indices:
        raise ValueError(
            f'probe_images={choice!r} is no folder, not "hardest" or "misclassified", and no list of indices'
        )
    if len(set(indices)) < len(indices):
        raise ValueError(f"probe_images={indices!r} names an image twice")
    return [int(index) for index in indices]


def files_of(folder: Path) -> list[tuple[Path, str | None]]:
    """Image files of a folder in a fixed order, each with its class: the name of the folder it lies in.

    Files that lie in `folder` itself have no class; one folder may not hold both kinds.

    Raises:
        ValueError: There are no images, or some have a class and some have not.
    """
    paths = sorted(
        p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")
    )
    if not paths:
        raise ValueError(f"there are no images in {folder}")
    files = [(path, None if path.parent == folder else path.relative_to(folder).parts[0]) for path in paths]
    if len({label is None for _, label in files}) > 1:
        raise ValueError(f"{folder} holds images beside class folders; put every image into one, or none")
    return files


def from_folder(
    folder: Path,
    num_images: int,
    prepare: Callable[[Image.Image], Tensor],
    class_names: Sequence[str] | None,
) -> ProbeBatch:
    """The files of a folder, classes taking turns.

    Args:
        folder: With files, or with a folder of files per class.
        num_images: At most so many.
        prepare: A photograph as the model receives it, `(channels, height, width)`.
        class_names: Name of each class, to turn the name of a folder into an index.

    Raises:
        ValueError: Unreadable files, or a folder that is no class; nothing is left out quietly.
    """
    chosen = _taking_turns(files_of(folder))[:num_images]
    images = torch.stack([_prepared(path, prepare) for path, _ in chosen])
    labels = [_class_index(label, class_names, folder) for _, label in chosen if label is not None]
    names = tuple(path.relative_to(folder).as_posix() for path, _ in chosen)
    return ProbeBatch(images, torch.tensor(labels) if labels else None, len(chosen), names)


def plain_preparation(
    size: tuple[int, int], mean: Sequence[float] | None, std: Sequence[float] | None
) -> Callable[[Image.Image], Tensor]:
    """Shorter side resized, centre cropped, normalised: what validation does where nobody says more.

    Args:
        size: Height and width.
        mean: Channel means; None leaves values between 0 and 1.
        std: Channel standard deviations.
    """

    def prepare(photograph: Image.Image) -> Tensor:
        height, width = size
        factor = max(height / photograph.height, width / photograph.width)
        scaled = [
            max(side, round(factor * of))
            for side, of in ((width, photograph.width), (height, photograph.height))
        ]
        left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
        resized = photograph.resize((scaled[0], scaled[1]), Image.Resampling.BICUBIC)
        pixels = np.asarray(resized.crop((left, top, left + width, top + height)), dtype=np.float32) / 255
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
        if mean is None or std is None:
            return image
        return (image - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]

    return prepare


def checked_indices(indices: Sequence[int], length: int) -> list[int]:
    """Refuse an index that the validation set does not have."""
    beyond = [index for index in indices if index >= length]
    if beyond:
        raise ValueError(f"probe_images asks for image {beyond[0]}, the validation set has {length}")
    return list(indices)


def candidates(length: int) -> list[int]:
    """Indices that "hardest" and "misclassified" look at, spread evenly."""
    count = min(length, CANDIDATES)
    return [index * length // count for index in range(count)]


def ranked(
    choice: Literal["hardest", "misclassified"],
    model: Callable[[Tensor], Any],
    images: Tensor,
    labels: Tensor,
) -> tuple[list[int], int]:
    """Positions by falling cross-entropy; for "misclassified", the mistaken before the others.

    Args:
        choice: Which.
        model: Images to logits; in evaluation mode, without gradients.
        images: `(candidates, channels, height, width)`, or what else stands for them, a row each.
        labels: `(candidates,)`.

    Returns:
        Positions, and how many of them are mistaken.
    """
    logits = torch.cat([logits_of(model(part)).float().cpu() for part in images.split(_BATCH)])
    kind = kind_of(logits)
    losses, mistaken = loss_of(logits, labels, kind), predicted(logits, kind) != labels
    # A loss that is not finite is as hard as can be.
    hardness = torch.nan_to_num(losses, nan=float("inf"), posinf=float("inf"))
    order = hardness.argsort(descending=True, stable=True).tolist()
    if choice == "misclassified":
        order = [i for i in order if mistaken[i]] + [i for i in order if not mistaken[i]]
    return order, int(mistaken.sum())


def _taking_turns(files: Sequence[tuple[Path, str | None]]) -> list[tuple[Path, str | None]]:
    seen: dict[str | None, int] = {}
    turns = []
    for path, label in files:
        seen[label] = seen.get(label, 0) + 1
        turns.append((seen[label], path, label))
    return [(path, label) for _, path, label in sorted(turns, key=lambda turn: turn[0])]


def _prepared(path: Path, prepare: Callable[[Image.Image], Tensor]) -> Tensor:
    try:
        return prepare(read_photograph(path))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read as an image ({error})") from error


def _class_index(label: str, class_names: Sequence[str] | None, folder: Path) -> int:
    if class_names is not None and label in class_names:
        return list(class_names).index(label)
    if label.isdigit() and (class_names is None or int(label) < len(class_names)):
        return int(label)
    known = ", ".join(map(str, class_names)) if class_names else "none are known, pass class_names"
    raise ValueError(f"the folder {folder / label} is no class of this data; its classes: {known}")
