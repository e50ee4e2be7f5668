"""Image classification data: the common base, and scikit-learn's handwritten digits."""

from abc import abstractmethod
from collections.abc import Callable, Sequence, Sized
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]


class ImageData(LightningDataModule):
    """Train and validation loaders of `(images, labels)`; a subclass says what the two sets are.

    Batches hold normalised float images `(batch, 3, image_size, image_size)` and integer labels
    `(batch,)`; sets that know where the evidence lies add boolean masks
    `(batch, image_size, image_size)` as a third element.

    Args:
        image_size: side of the square images in pixels.
        batch_size: images per batch and process.
        num_workers: loader processes; 0 loads in the training process.
        mean: channel means that images are normalised with; None takes the model's own
            (`pretrained_cfg`), or ImageNet's where there is no model.
        std: channel standard deviations, as `mean`.

    Attributes:
        num_classes: number of classes, known before `setup`.
        class_names: one name per class in label order, or None until `setup` has found them.
    """

    num_classes: int
    class_names: list[str] | None = None

    def __init__(
        self,
        image_size: int = 224,
        batch_size: int = 64,
        num_workers: int = 0,
        mean: list[float] | None = None,
        std: list[float] | None = None,
    ):
        super().__init__()
        if image_size < 1 or batch_size < 1 or num_workers < 0:
            raise ValueError(
                "image_size and batch_size must be at least 1 and num_workers at least 0, "
                f"got {image_size}, {batch_size} and {num_workers}"
            )
        if (mean is None) != (std is None):
            raise ValueError("mean and std belong together: give both or neither")
        self.image_size = image_size
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.mean = mean
        self.std = std
        self.train_set: Dataset | None = None
        self.val_set: Dataset | None = None

    @abstractmethod
    def splits(self) -> tuple[Dataset, Dataset]:
        """Return the training and the validation set; `mean` and `std` are final by now."""

    def setup(self, stage: str | None = None) -> None:
        """Settle the normalisation and make the two sets, once."""
        if self.train_set is not None:
            return
        if self.mean is None:
            model = self.trainer.lightning_module if self.trainer else None
            self.mean = getattr(model, "mean", IMAGENET_MEAN)
            self.std = getattr(model, "std", IMAGENET_STD)
        self.train_set, self.val_set = self.splits()

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches of one size; a last, smaller batch is dropped unless it is the only one."""
        count = len(cast(Sized, self.train_set))
        return self._loader(self.train_set, shuffle=True, drop_last=count >= self.batch_size)

    def val_dataloader(self) -> DataLoader:
        """Every validation image, in a fixed order."""
        return self._loader(self.val_set, shuffle=False, drop_last=False)

    def _loader(self, dataset: Dataset | None, *, shuffle: bool, drop_last: bool) -> DataLoader:
        assert dataset is not None, "setup() comes before the loaders"
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def to_input(self) -> list[v2.Transform]:
        """Return the last transforms of every pipeline: float in [0, 1], then normalised."""
        mean, std = self.mean or IMAGENET_MEAN, self.std or IMAGENET_STD
        return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean=mean, std=std)]


class LabelledImages(Dataset):
    """Images held in memory, with labels and, where they are known, masks of the evidence.

    Args:
        images: uint8 tensor `(count, 3, height, width)`.
        labels: int64 tensor `(count,)`.
        transform: called on each image.
        masks: bool tensor `(count, height, width)`, True where the evidence for the label lies.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        transform: Callable[[Tensor], Tensor],
        masks: Tensor | None = None,
    ):
        self.images = images
        self.labels = labels
        self.transform = transform
        self.masks = masks

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        item = self.transform(self.images[index]), self.labels[index]
        return item if self.masks is None else (*item, self.masks[index])


def stratified_split(labels: Sequence[int], val_fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Split indices so that each class keeps its share on both sides.

    Args:
        labels: the class of each item.
        val_fraction: share of the items to validate on, between 0 and 1.
        seed: the same seed gives the same split.

    Returns:
        Sorted indices of the training and of the validation items.

    Raises:
        ValueError: `val_fraction` is not inside (0, 1), or a class has fewer than two items.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction must lie between 0 and 1, got {val_fraction}")
    train, val = train_test_split(
        np.arange(len(labels)), test_size=val_fraction, stratify=np.asarray(labels), random_state=seed
    )
    return sorted(int(at) for at in train), sorted(int(at) for at in val)


def digit_arrays(val_fraction: float, seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return scikit-learn's 1,797 real handwritten digits, split by class.

    The images are part of the scikit-learn package (test set of the UCI optical recognition of
    handwritten digits data, by Alpaydin and Kaynak), so nothing is downloaded.

    Returns:
        `(images, labels)` to train and to validate on: grey float values in [0, 1] of shape
        `(count, 8, 8)` and int64 labels `(count,)`.
    """
    images, labels = cast(tuple[np.ndarray, np.ndarray], load_digits(return_X_y=True))
    pixels = torch.from_numpy(images).float().reshape(-1, 8, 8) / 16
    classes = torch.from_numpy(labels).long()
    train, val = stratified_split(labels.tolist(), val_fraction, seed)
    return (pixels[train], classes[train]), (pixels[val], classes[val])


def enlarge(grey: Tensor, size: int) -> Tensor:
    """Turn grey values in [0, 1] `(count, h, w)` into uint8 images `(count, 3, size, size)`."""
    large = functional.interpolate(grey[:, None], size=(size, size), mode="bilinear", align_corners=False)
    return (large * 255).round().clamp(0, 255).byte().expand(-1, 3, -1, -1).contiguous()


class Digits(ImageData):
    """Real handwritten digits, 1,797 of them, upscaled; inside scikit-learn, so no download.

    Args:
        image_size: side of the upscaled images in pixels.
        batch_size: images per batch and process.
        num_workers: loader processes.
        mean: channel means to normalise with.
        std: channel standard deviations.
        val_fraction: share of each class to validate on.
        augment: small random rotations, shifts and zooms of the training images.
        split_seed: the same seed gives the same split.
    """

    num_classes = 10

    def __init__(
        self,
        image_size: int = 32,
        batch_size: int = 64,
        num_workers: int = 0,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        val_fraction: float = 0.2,
        augment: bool = True,
        split_seed: int = 0,
    ):
        super().__init__(image_size, batch_size, num_workers, mean, std)
        self.class_names = [str(digit) for digit in range(10)]
        self.val_fraction = val_fraction
        self.augment = augment
        self.split_seed = split_seed

    def splits(self) -> tuple[Dataset, Dataset]:
        """Return the two sets of digits; only the training images are augmented."""
        train, val = digit_arrays(self.val_fraction, self.split_seed)
        jitter: list[v2.Transform] = (
            [v2.RandomAffine(degrees=(-10, 10), translate=(0.1, 0.1), scale=(0.9, 1.1))]
            if self.augment
            else []
        )
        return (
            LabelledImages(
                enlarge(train[0], self.image_size), train[1], v2.Compose(jitter + self.to_input())
            ),
            LabelledImages(enlarge(val[0], self.image_size), val[1], v2.Compose(self.to_input())),
        )
