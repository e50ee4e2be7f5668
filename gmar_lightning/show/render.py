"""Photographs under their heatmaps. numpy and PIL; uint8 in, uint8 out."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from gmar_lightning.show.colour import HEAT


def to_uint8_image(
    image: Any, mean: Sequence[float] | float | None = None, std: Sequence[float] | float | None = None
) -> np.ndarray:
    """What the model saw, as a photograph.

    Floating values are de-normalised with `mean` and `std` when given; values outside 0 to 1 without
    them are stretched to the image's own range, as nothing else is known about it. Integers are taken
    as 0 to 255.

    Args:
        image: `(channels, height, width)` or `(height, width, channels)` with 1 or 3 channels (of more,
            the first three), or `(height, width)`; array or tensor of any dtype on any device.
        mean: per channel, in the order of the channels.
        std: per channel.

    Returns:
        uint8 `(height, width, 3)`. NaN becomes mid-grey.

    Raises:
        ValueError: not an image of these shapes.
    """
    array, is_float = _as_array(image)
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3:
        raise ValueError(f"an image has two or three dimensions, not shape {array.shape}")
    if array.shape[0] in (1, 3) or array.shape[2] not in (1, 3):
        array = array.transpose(1, 2, 0)
    if array.shape[2] < 3:
        array = array[:, :, :1]
    array = array[:, :, :3]
    if is_float:
        array = 255.0 * _in_unit_range(array, mean, std)
    array = np.clip(np.nan_to_num(array, nan=127.0), 0, 255).round().astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))


def enlarged(image: np.ndarray, least: int = 192) -> np.ndarray:
    """An image whose longer side is under `least` pixels, enlarged to it; others as they are.

    Args:
        image: uint8 `(height, width, 3)`.
        least: pixels.
    """
    height, width = image.shape[:2]
    factor = least / max(height, width)
    if factor <= 1:
        return image
    size = (round(width * factor), round(height * factor))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def overlay(image: np.ndarray, heatmap: np.ndarray, alpha: float = 0.75, strength: float = 1.0) -> np.ndarray:
    """Photograph with its heatmap: hot patches coloured, cold ones left visible in pale grey.

    Each map is scaled from its own minimum to its own maximum. A constant map shows no colour at all;
    patches that are not finite are striped.

    Args:
        image: uint8 `(height, width, 3)`.
        heatmap: `(grid_h, grid_w)`, any range.
        alpha: opacity of the hottest patch, 0 to 1.
        strength: below 1, the map fades towards one without heat: for maps that are weak beside others.

    Returns:
        uint8 `(height, width, 3)`.
    """
    height, width = image.shape[:2]
    grid = np.asarray(heatmap, dtype=np.float32)
    missing = ~np.isfinite(grid)
    heat = strength * _resize(_unit(np.where(missing, np.float32(np.nan), grid)), width, height)[:, :, None]
    photo = image.astype(np.float32)
    grey = photo @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    cold = 0.72 * grey[:, :, None] + 54.0
    base = cold + (photo - cold) * np.minimum(1.0, 2.0 * heat)
    colours = HEAT[(heat[:, :, 0] * 255).astype(np.uint8)]
    # opacity grows with heat: the photograph stays readable where the map says nothing
    picture = base + (colours - base) * (alpha * heat**0.8)
    if missing.any():
        lost = np.asarray(Image.fromarray(missing).resize((width, height), Image.Resampling.NEAREST))
        picture = np.where(lost[:, :, None], _stripes(height, width, grey), picture)
    return np.clip(picture, 0, 255).astype(np.uint8)


def contact_sheet(images: Sequence[np.ndarray], columns: int = 8, gap: int = 4) -> np.ndarray:
    """Images uint8 `(height, width, 3)` side by side on white, each fitted into the first one's size."""
    height, width = images[0].shape[:2]
    rows = -(-len(images) // columns)
    columns = min(columns, len(images))
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), (255, 255, 255))
    for index, image in enumerate(images):
        tile = Image.fromarray(image)
        tile.thumbnail((width, height))
        sheet.paste(tile, (index % columns * (width + gap), index // columns * (height + gap)))
    return np.asarray(sheet)


def sheet_with_titles(rows: Sequence[tuple[str, Sequence[np.ndarray]]], width: int = 160) -> np.ndarray:
    """Rows of images uint8 `(height, width, 3)` on white, each row under its title.

    Args:
        rows: Title and images; all rows show the same photographs.
        width: Of an image, pixels; the height follows.
    """
    gap, line = 6, 20
    height = round(width * rows[0][1][0].shape[0] / rows[0][1][0].shape[1])
    columns = max(len(images) for _, images in rows)
    size = (columns * (width + gap) + gap, len(rows) * (line + height + gap))
    sheet = Image.new("RGB", size, (255, 255, 255))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for row, (title, images) in enumerate(rows):
        top = row * (line + height + gap)
        draw.text((gap, top + 3), title, fill=(40, 44, 52), font=font)
        for column, image in enumerate(images):
            tile = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
            sheet.paste(tile, (gap + column * (width + gap), top + line))
    return np.asarray(sheet)


def on_one_sheet(rows: Sequence[Sequence[np.ndarray]], gap: int = 12) -> np.ndarray:
    """Pictures uint8 `(height, width, 3)` of any size on white: rows below each other, each from left to right."""
    heights = [max(picture.shape[0] for picture in row) for row in rows]
    width = max(sum(picture.shape[1] + gap for picture in row) for row in rows)
    sheet = np.full((sum(heights) + gap * len(rows), width, 3), 255, np.uint8)
    top = 0
    for row, height in zip(rows, heights, strict=True):
        left = 0
        for picture in row:
            sheet[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
            left += picture.shape[1] + gap
        top += height + gap
    return sheet


def _as_array(image: Any) -> tuple[np.ndarray, bool]:
    if hasattr(image, "detach"):
        image = image.detach().cpu()
        image = image.float().numpy() if image.is_floating_point() else image.numpy()
    array = np.asarray(image)
    is_float = array.dtype.kind == "f"
    return array.astype(np.float32), is_float


def _in_unit_range(array: np.ndarray, mean: Any, std: Any) -> np.ndarray:
    if mean is not None or std is not None:
        channels = array.shape[2]
        offset = np.resize(np.asarray(0.0 if mean is None else mean, dtype=np.float32), channels)
        factor = np.resize(np.asarray(1.0 if std is None else std, dtype=np.float32), channels)
        return array * factor + offset
    finite = array[np.isfinite(array)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    if low >= -1e-3 and high <= 1.0 + 1e-3:
        return array
    return (array - low) / max(high - low, 1e-12)


def _unit(grid: np.ndarray) -> np.ndarray:
    finite = grid[np.isfinite(grid)]
    if not finite.size:
        return np.zeros_like(grid)
    low, high = float(finite.min()), float(finite.max())
    # what differs by less than float32 noise is constant: stretching it would invent structure
    if high - low <= 1e-5 * max(abs(low), abs(high)):
        return np.zeros_like(grid)
    return np.nan_to_num((grid - low) / (high - low), nan=0.0)


def _resize(unit: np.ndarray, width: int, height: int) -> np.ndarray:
    large = Image.fromarray(unit.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(large), 0.0, 1.0)


def _stripes(height: int, width: int, grey: np.ndarray) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    on = ((x + y) // 6 % 2).astype(bool)[:, :, None]
    return np.where(on, np.array([196, 70, 140], dtype=np.float32), 0.5 * grey[:, :, None] + 110.0)
