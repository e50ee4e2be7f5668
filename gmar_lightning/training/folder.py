"""Photographs in folders, one folder per class."""

from collections.abc import Callable
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from gmar_lightning.monitor.photographs import read_photograph
from gmar_lightning.training.data import ImageData, stratified_split

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
VAL_NAMES = ("val", "valid", "validation")


class ImageFiles(Dataset):
    """Image files with labels, decoded on access.

    Args:
        paths: the files.
        labels: the class of each file.
        transform: turns an RGB PIL image into a tensor.
    """

    def __init__(self, paths: list[Path], labels: list[int], transform: Callable[[Image.Image], Tensor]):
        self.paths = paths
        self.labels = torch.tensor(labels)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        path = self.paths[index]
        try:
            rgb = read_photograph(path)
        except (OSError, ValueError) as error:
            raise RuntimeError(f"{path} cannot be decoded ({error}): repair or remove this file") from error
        return self.transform(rgb), self.labels[index]


def files_by_class(root: Path) -> dict[str, list[Path]]:
    """List the image files below each class folder of `root`, in sorted order.

    Raises:
        FileNotFoundError: `root` does not exist.
        ValueError: there is no class folder with an image in it.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"there is no image folder {root.resolve()}")
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    found = {
        folder.name: sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        for folder in folders
    }
    empty = [name for name, files in found.items() if not files]
    if len(empty) == len(found):
        raise ValueError(
            f"no images under {root.resolve()}: expected <class>/<name>.jpg or train/<class>/<name>.jpg with "
            f"val/<class>/<name>.jpg; folders found: {', '.join(found) or 'none'}"
        )
    if empty:
        rank_zero_warn(f"class folders without images in {root.resolve()}, left out: {', '.join(empty)}")
    return {name: files for name, files in found.items() if files}


def readable(paths: list[Path]) -> list[Path]:
    """Return the files that open as images; the others are named in one warning.

    Only headers are read, which is quick; a file that breaks off in the middle is named when it is decoded.
    """
    broken: list[Path] = []
    for path in paths:
        try:
            with Image.open(path) as image:
                image.verify()
        except Exception:  # decoders fail in ways of their own
            broken.append(path)
    if broken:
        names = ", ".join(str(path) for path in broken[:10]) + (", ..." if len(broken) > 10 else "")
        rank_zero_warn(
            f"{len(broken)} of {len(paths)} files cannot be read as images and are left out: {names}"
        )
    return [path for path in paths if path not in set(broken)]


class ImageFolder(ImageData):
    """Any `<class>/<name>.jpg` tree.

    With `train` and `val` (or `valid`, `validation`) folders inside `root`, those are the two
    sets; otherwise `root` itself holds the class folders and is split by class.

    Args:
        root: the folder.
        image_size: side of the square images in pixels.
        batch_size: images per batch and process.
        num_workers: loader processes.
        mean: channel means to normalise with; None takes the model's own.
        std: channel standard deviations, as `mean`.
        val_fraction: share of each class to validate on, where there is no `val` folder.
        split_seed: the same seed gives the same split.
        min_crop: smallest share of a photograph's area that a random training crop shows; 1 switches
            random crops off.
        flip: mirror training images left to right at random.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: no images, or other classes to validate on than to train on.
    """

    def __init__(
        self,
        root: str,
        image_size: int = 224,
        batch_size: int = 64,
        num_workers: int = 0,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        val_fraction: float = 0.2,
        split_seed: int = 0,
        min_crop: float = 0.35,
        flip: bool = True,
    ):
        super().__init__(image_size, batch_size, num_workers, mean, std)
        if not 0 < min_crop <= 1:
            raise ValueError(f"min_crop must lie in (0, 1], got {min_crop}")
        self.val_fraction = val_fraction
        self.split_seed = split_seed
        self.min_crop = min_crop
        self.flip = flip
        self._train_files, self._val_files = self._find(Path(root))
        self.class_names = list(self._train_files)
        self.num_classes = len(self.class_names)

    @staticmethod
    def _find(root: Path) -> tuple[dict[str, list[Path]], dict[str, list[Path]] | None]:
        val_root = next((root / name for name in VAL_NAMES if (root / name).is_dir()), None)
        if not (root / "train").is_dir() or val_root is None:
            return files_by_class(root), None
        train, val = files_by_class(root / "train"), files_by_class(val_root)
        if set(train) != set(val):
            raise ValueError(
                f"{root.resolve()}: classes only in train: {sorted(set(train) - set(val)) or 'none'}, "
                f"only in {val_root.name}: {sorted(set(val) - set(train)) or 'none'}"
            )
        return train, val

    def splits(self) -> tuple[Dataset, Dataset]:
        """Return the two sets of files that open as images."""
        train = self._labelled(self._train_files)
        if self._val_files is not None:
            val = self._labelled(self._val_files)
        else:
            train_at, val_at = stratified_split(
                [label for _, label in train], self.val_fraction, self.split_seed
            )
            train, val = [train[at] for at in train_at], [train[at] for at in val_at]
        return self._dataset(train, self.train_transform()), self._dataset(val, self.val_transform())

    def _labelled(self, files: dict[str, list[Path]]) -> list[tuple[Path, int]]:
        usable = set(readable([path for paths in files.values() for path in paths]))
        labels = {name: label for label, name in enumerate(self.class_names or [])}
        return [(path, labels[name]) for name, paths in files.items() for path in paths if path in usable]

    @staticmethod
    def _dataset(items: list[tuple[Path, int]], transform: v2.Transform) -> ImageFiles:
        return ImageFiles([path for path, _ in items], [label for _, label in items], transform)

    def train_transform(self) -> v2.Transform:
        """Random crop and mirror image, then tensor."""
        return photograph_transform(self, self.min_crop, self.flip)

    def val_transform(self) -> v2.Transform:
        """The centre of the photograph, then tensor."""
        return photograph_transform(self, 1.0, False)


def photograph_transform(data: ImageData, min_crop: float, flip: bool) -> v2.Transform:
    """Return the steps from an RGB photograph to a normalised `(3, image_size, image_size)` tensor."""
    size = data.image_size
    if min_crop < 1:
        steps: list[v2.Transform] = [v2.RandomResizedCrop(size, scale=(min_crop, 1.0), antialias=True)]
    else:
        steps = [v2.Resize(size, antialias=True), v2.CenterCrop(size)]
    if flip:
        steps.append(v2.RandomHorizontalFlip())
    return v2.Compose([*steps, v2.ToImage(), *data.to_input()])
