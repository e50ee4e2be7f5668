"""The border of a known region, such as the object's mask, drawn on a picture."""

import numpy as np
from PIL import Image

# Seen on any photograph and on the heat's colours alike: white, with a dark edge on both sides.
_LINE, _EDGE = (255, 255, 255), (16, 20, 28)


def outlined(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A picture with the border of a region drawn just inside it; the region itself stays visible.

    Args:
        image: uint8 `(height, width, 3)`.
        mask: bool `(mask_height, mask_width)`, True inside the region; enlarged to the picture.

    Returns:
        uint8 `(height, width, 3)`; the picture itself where the mask is all True or all False, which has no border.
    """
    height, width = image.shape[:2]
    inside = np.asarray(
        Image.fromarray(np.asarray(mask, dtype=bool)).resize((width, height), Image.Resampling.NEAREST)
    )
    if inside.all() or not inside.any():
        return image
    thickness = max(1, round(min(height, width) / 96))
    outer = inside & ~_shrunk(inside, thickness)
    line = _shrunk(inside, thickness) & ~_shrunk(inside, 2 * thickness)
    inner = _shrunk(inside, 2 * thickness) & ~_shrunk(inside, 3 * thickness)
    picture = image.copy()
    picture[outer | inner] = _EDGE
    picture[line] = _LINE
    return picture


def _shrunk(inside: np.ndarray, by: int) -> np.ndarray:
    """The region without the pixels nearer than `by` to its border; the picture's own rim counts as border."""
    padded = np.pad(inside, by)
    height, width = inside.shape
    kept = inside.copy()
    # Rows, then columns: the erosion by a square is the product of the two.
    for shift in range(-by, by + 1):
        kept &= padded[by + shift : by + shift + height, by : by + width]
    padded = np.pad(kept, by)
    for shift in range(-by, by + 1):
        kept &= padded[by : by + height, by + shift : by + shift + width]
    return kept
