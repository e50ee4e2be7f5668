"""How tables and maps are packed into the report: whole numbers of 4, 8 or 16 bits, as base64."""

import base64

import numpy as np
from PIL import Image


def base64_of(content: bytes | np.ndarray) -> str:
    """Base64 as text."""
    return base64.b64encode(content if isinstance(content, bytes) else content.tobytes()).decode("ascii")


def quantised(values: np.ndarray, low: float, high: float, missing: int, root: bool = False) -> np.ndarray:
    """Whole numbers 0 to `missing - 1` for `low` to `high`, `missing` where not finite."""
    finite = np.isfinite(values)
    unit = np.clip((np.where(finite, values, low) - low) / ((high - low) or 1.0), 0, 1)
    scaled = (np.sqrt(unit) if root else unit) * (missing - 1)
    return np.where(finite, scaled.round(), missing)


def nibbles(unit: np.ndarray) -> np.ndarray:
    """Values in 0 to 1 as 4 bits each, two to a byte, the high half first; 15 where not finite."""
    flat = quantised(unit.ravel(), 0.0, 1.0, 15).astype(np.uint8)
    flat = np.pad(flat, (0, flat.size % 2))
    return flat[0::2] << 4 | flat[1::2]


def at_most(grid: np.ndarray, side: int) -> np.ndarray:
    """A grid averaged down until its longer side has `side` cells; smaller ones as they are."""
    if max(grid.shape) <= side:
        return grid
    size = [max(1, round(n * side / max(grid.shape))) for n in (grid.shape[1], grid.shape[0])]
    image = Image.fromarray(grid.astype(np.float32))
    return np.asarray(image.resize((size[0], size[1]), Image.Resampling.BOX))
