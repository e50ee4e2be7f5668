"""Digits whose evidence was put where we know it: in one cell of four, or in a watermark."""

import colorsys

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from gmar_lightning.training.data import ImageData, LabelledImages, digit_arrays, enlarge


class Cells(ImageData):
    """One real digit in one of four cells; the other cells hold digits with their pixels shuffled.

    The label is the real digit, so the whole evidence lies in its cell: batches carry a mask of that cell
    as their third element. Shuffled cells have the brightness and smoothness of digits, and no shape.
    The same seed gives the same images.

    Args:
        image_size: side of the images in pixels, even; half of it should be a multiple of the patch size,
            so that cells and patches share their borders.
        batch_size: images per batch and process.
        num_workers: loader processes.
        mean: channel means to normalise with.
        std: channel standard deviations.
        val_fraction: share of the digits to validate on.
        copies: training images made from each digit, with the digit in another cell and other neighbours.
        seed: of the split, the cells and the shuffling.

    Raises:
        ValueError: `image_size` is odd, or `copies` is not positive.
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
        copies: int = 4,
        seed: int = 0,
    ):
        super().__init__(image_size, batch_size, num_workers, mean, std)
        if image_size % 2 or copies < 1:
            raise ValueError(f"image_size must be even and copies at least 1, got {image_size} and {copies}")
        self.class_names = [str(digit) for digit in range(10)]
        self.val_fraction = val_fraction
        self.copies = copies
        self.seed = seed

    def splits(self) -> tuple[Dataset, Dataset]:
        """Return the two sets; no digit is in both, not even shuffled."""
        train, val = digit_arrays(self.val_fraction, self.seed)
        return self._dataset(*train, self.copies), self._dataset(*val, 1)

    def _dataset(self, digits: Tensor, labels: Tensor, copies: int) -> LabelledImages:
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.arange(len(digits)).repeat(copies)
        # Every copy of a digit moves on to the next cell.
        cells = (order + torch.arange(copies).repeat_interleave(len(digits))) % 4
        pieces = shuffled_pixels(digits, len(order) * 4, generator).reshape(len(order), 4, 8, 8)
        pieces[torch.arange(len(order)), cells] = digits[order]
        side = self.image_size // 2
        large = enlarge(pieces.flatten(0, 1), side).unflatten(0, (len(order), 2, 2))
        images = large.permute(0, 3, 1, 4, 2, 5).reshape(len(order), 3, 2 * side, 2 * side)
        return LabelledImages(images, labels[order], v2.Compose(self.to_input()), cell_masks(cells, side))


def shuffled_pixels(digits: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw `count` of the digits `(n, 8, 8)` and shuffle the pixels of each."""
    drawn = digits[torch.randint(len(digits), (count,), generator=generator)].flatten(1)
    order = torch.rand(drawn.shape, generator=generator).argsort(dim=1)
    return drawn.gather(1, order).reshape(count, 8, 8)


def cell_masks(cells: Tensor, side: int) -> Tensor:
    """Return masks `(count, 2 * side, 2 * side)` of the cells 0 to 3, numbered row by row."""
    grid = torch.nn.functional.one_hot(cells, 4).bool().reshape(-1, 2, 2)
    return grid.repeat_interleave(side, dim=1).repeat_interleave(side, dim=2)


class WatermarkedDigits(ImageData):
    """Digits with a coloured square in the upper left corner, whose colour tells the class.

    A model can take this shortcut and look perfect without reading a single digit. Batches carry a mask of
    the square as their third element.

    Args:
        image_size: side of the images in pixels; the square's side is an eighth of it.
        batch_size: images per batch and process.
        num_workers: loader processes.
        mean: channel means to normalise with.
        std: channel standard deviations.
        val_fraction: share of the digits to validate on.
        correlation: share of the training images whose square has the colour of their class; the others
            get a colour at random. 0 makes the squares meaningless.
        val_correlation: the same for the validation images; None takes that of the training images, as
            where both were collected in the same way.
        seed: of the split and the random colours.

    Raises:
        ValueError: a correlation is outside [0, 1].
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
        correlation: float = 1.0,
        val_correlation: float | None = None,
        seed: int = 0,
    ):
        super().__init__(image_size, batch_size, num_workers, mean, std)
        self.correlation = correlation
        self.val_correlation = correlation if val_correlation is None else val_correlation
        if not (0 <= self.correlation <= 1 and 0 <= self.val_correlation <= 1):
            raise ValueError(
                f"a correlation lies in [0, 1], got {self.correlation} and {self.val_correlation}"
            )
        self.class_names = [str(digit) for digit in range(10)]
        self.val_fraction = val_fraction
        self.seed = seed

    def splits(self) -> tuple[Dataset, Dataset]:
        """Return the two sets of marked digits."""
        train, val = digit_arrays(self.val_fraction, self.seed)
        return self._dataset(*train, self.correlation), self._dataset(*val, self.val_correlation)

    def _dataset(self, digits: Tensor, labels: Tensor, correlation: float) -> LabelledImages:
        generator = torch.Generator().manual_seed(self.seed)
        honest = torch.rand(len(labels), generator=generator) < correlation
        anything = torch.randint(self.num_classes, labels.shape, generator=generator)
        side = max(1, self.image_size // 8)
        images = enlarge(digits, self.image_size)
        images[:, :, :side, :side] = mark_colours()[torch.where(honest, labels, anything)][:, :, None, None]
        masks = torch.zeros(len(labels), self.image_size, self.image_size, dtype=torch.bool)
        masks[:, :side, :side] = True
        return LabelledImages(images, labels, v2.Compose(self.to_input()), masks)


def mark_colours() -> Tensor:
    """Return ten colours around the colour circle, uint8 `(10, 3)`."""
    return torch.tensor([colorsys.hsv_to_rgb(hue / 10, 1.0, 1.0) for hue in range(10)]).mul(255).byte()
