"""Pictures of what single heads attend to. numpy and PIL; uint8 out."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from gmar_lightning.show.grids import short_names
from gmar_lightning.show.render import overlay, sheet_with_titles

# A map whose peak is below this part of the highest of its layer fades: stretched to full colour, noise would look
# like attention.
FAINT = 0.02


def head_picture(
    images: Sequence[np.ndarray],
    now: np.ndarray,
    before: np.ndarray | None,
    layer: int,
    head: int,
    sibling: int | None,
    titles: Sequence[str] = ("before", "now", "sibling"),
) -> np.ndarray:
    """One picture of a flagged head: before, now, and a healthy head of its layer, on every photograph.

    Args:
        images: Photographs, uint8 `(height, width, 3)`.
        now: Maps of heads `(images, layers, heads, grid_h, grid_w)` at the flag.
        before: The same at the last healthy probe; None leaves the row out.
        layer: The flagged head's layer.
        head: The flagged head.
        sibling: A healthy head of the layer; None leaves the row out.
        titles: Of the three rows.

    Returns:
        uint8 `(height, width, 3)`.
    """
    chosen = [(titles[0], before, head), (titles[1], now, head), (titles[2], now, sibling)]
    rows = [
        (title, [_drawn(image, maps[k, layer], at) for k, image in enumerate(images[: len(maps)])])
        for title, maps, at in chosen
        if maps is not None and at is not None
    ]
    return sheet_with_titles(rows)


def all_heads_sheet(image: np.ndarray, maps: np.ndarray, layers: Sequence[str], side: int = 96) -> np.ndarray:
    """What every head attends to in one photograph: a row for each layer, a column for each head.

    Args:
        image: The photograph, uint8 `(height, width, 3)`.
        maps: Maps of heads `(layers, heads, grid_h, grid_w)`; NaN where a layer has fewer heads.
        layers: Names of the layers.
        side: Longer side of each tile, pixels.

    Returns:
        uint8 `(height, width, 3)`.
    """
    factor = side / max(image.shape[:2])
    size = max(1, round(image.shape[1] * factor)), max(1, round(image.shape[0] * factor))
    small = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
    rows = [
        (
            f"layer {name}",
            [_drawn(small, layer, head) for head in range(len(layer)) if np.isfinite(layer[head]).any()],
        )
        for name, layer in zip(short_names(layers), maps, strict=True)
    ]
    return sheet_with_titles(rows, width=size[0])


def _drawn(image: np.ndarray, layer_maps: np.ndarray, head: int) -> np.ndarray:
    """A head's map on a photograph, faded where it is faint beside the layer's strongest head."""
    strength = float(strengths(layer_maps[None, None])[0, 0, head])
    return overlay(image, layer_maps[head], strength=min(1.0, strength / FAINT))


def strengths(maps: np.ndarray) -> np.ndarray:
    """Peak of each map as part of the highest in its layer, `(images, layers, heads)`; 0 where nothing is known."""
    peaks = np.where(np.isfinite(maps), maps, 0.0).max(axis=(-2, -1))
    highest = peaks.max(axis=-1, keepdims=True)
    return np.divide(peaks, highest, out=np.zeros_like(peaks), where=highest > 0)
