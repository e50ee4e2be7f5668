"""Image files as a person sees them: upright, in RGB, 8 bits; whatever is wrong with one is one kind of error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps


def read_photograph(path: Path) -> Image.Image:
    """An image file in RGB, turned upright as its camera says; of an animation, the first picture.

    Raises:
        OSError: There is no such file, or it breaks off.
        ValueError: It is no picture, or unpacks to more pixels than any photograph has.
    """
    try:
        with Image.open(path) as image:
            return _in_rgb(ImageOps.exif_transpose(image))
    except (OSError, ValueError):
        raise
    except Exception as error:
        # Decoders fail in ways of their own: SyntaxError, struct.error, DecompressionBombError, ...
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _in_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, and nothing says which of them is white")
    if image.mode.startswith("I"):
        # Converting 16 bits would cut off at 255, which turns nearly all of a picture white.
        pixels = np.asarray(image, dtype=np.float64)
        top = 65535 if ";16" in image.mode or pixels.max(initial=0) > 255 else 255
        image = Image.fromarray((pixels.clip(0, top) * (255 / top)).round().astype(np.uint8))
    return image.convert("RGB")
