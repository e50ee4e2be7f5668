"""CIFAR-10, CIFAR-100 and Oxford-IIIT Pets, as torchvision fetches them."""

from abc import abstractmethod
from typing import Any

from torch.utils.data import Dataset
from torchvision import datasets
from torchvision.transforms import v2

from gmar_lightning.training.data import ImageData
from gmar_lightning.training.folder import photograph_transform


class DownloadedImages(ImageData):
    """A data set that torchvision downloads into `root` unless it is already there.

    Args:
        root: where the data set is, or goes.
        image_size: side of the square images in pixels.
        batch_size: images per batch and process.
        num_workers: loader processes.
        mean: channel means to normalise with; None takes the model's own.
        std: channel standard deviations, as `mean`.
        min_crop: smallest share of a photograph's area that a random training crop shows; 1 switches
            random crops off.
        flip: mirror training images left to right at random.

    Raises:
        RuntimeError: the data set is not in `root` and cannot be downloaded.
    """

    def __init__(
        self,
        root: str = "data",
        image_size: int = 224,
        batch_size: int = 64,
        num_workers: int = 0,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        min_crop: float = 0.35,
        flip: bool = True,
    ):
        super().__init__(image_size, batch_size, num_workers, mean, std)
        self.root = root
        self.min_crop = min_crop
        self.flip = flip

    @abstractmethod
    def source(self, *, train: bool, download: bool, transform: v2.Transform | None = None) -> Any:
        """Return one of the two sets, a torchvision data set with `classes`."""

    def prepare_data(self) -> None:
        """Download what is missing, in one process."""
        try:
            for train in (True, False):
                self.source(train=train, download=True)
        except (OSError, RuntimeError) as error:
            raise RuntimeError(
                f"{type(self).__name__} is not in {self.root!r} and could not be downloaded ({error}). "
                "Without a connection, copy torchvision's download there, or train on a folder of your own "
                "(ImageFolder) or on Digits, which needs none"
            ) from error

    def splits(self) -> tuple[Dataset, Dataset]:
        """Return the set's own training and test images."""
        train = self.source(
            train=True, download=False, transform=photograph_transform(self, self.min_crop, self.flip)
        )
        val = self.source(train=False, download=False, transform=photograph_transform(self, 1.0, False))
        self.class_names = list(train.classes)
        return train, val


class Cifar10(DownloadedImages):
    """60,000 photographs of 32 x 32 pixels in 10 classes; arguments as `DownloadedImages`."""

    num_classes = 10

    def source(self, *, train: bool, download: bool, transform: v2.Transform | None = None) -> Any:
        """Return torchvision's `CIFAR10`."""
        return datasets.CIFAR10(self.root, train=train, download=download, transform=transform)


class Cifar100(DownloadedImages):
    """60,000 photographs of 32 x 32 pixels in 100 classes; arguments as `DownloadedImages`."""

    num_classes = 100

    def source(self, *, train: bool, download: bool, transform: v2.Transform | None = None) -> Any:
        """Return torchvision's `CIFAR100`."""
        return datasets.CIFAR100(self.root, train=train, download=download, transform=transform)


class OxfordPets(DownloadedImages):
    """7,349 photographs of 37 breeds of cats and dogs; arguments as `DownloadedImages`."""

    num_classes = 37

    def source(self, *, train: bool, download: bool, transform: v2.Transform | None = None) -> Any:
        """Return torchvision's `OxfordIIITPet`."""
        split = "trainval" if train else "test"
        return datasets.OxfordIIITPet(self.root, split=split, download=download, transform=transform)
