"""How a result shows itself in a notebook: a little HTML with its pictures inside, and no other package."""

from __future__ import annotations

import base64
import html
import struct
import zlib
from collections.abc import Sequence

import numpy as np

# Every 17th entry of the colour scale of all pictures (`show.colour.HEAT`), which this room may not import.
_STOPS = np.frombuffer(
    bytes.fromhex(
        "0c0b1c 1a1039 2d1358 46166f 651979 841d7a a22374 be2d68 d63d58 e75645 f27236 f9902f feac33 feca4c "
        "fae582 fafabb"
    ),
    np.uint8,
).reshape(-1, 3)


def heat(values: np.ndarray) -> np.ndarray:
    """A grid in colours, uint8 `(height, width, 3)`; lowest value dark, highest bright, not finite grey."""
    finite = np.isfinite(values)
    known = values[finite]
    low, high = (known.min(), known.max()) if known.size else (0.0, 0.0)
    # A constant grid has no highest place: it stays dark.
    unit = np.where(finite, values - low, 0.0) / (high - low) if high > low else np.zeros(values.shape)
    place = unit * (len(_STOPS) - 1)
    channels = [np.interp(place, np.arange(len(_STOPS)), column) for column in _STOPS.T]
    colours = np.stack(channels, -1).round().astype(np.uint8)
    colours[~finite] = 128
    return colours


def png(pixels: np.ndarray) -> bytes:
    """A PNG file of uint8 `(height, width, 3)` (ISO/IEC 15948: 8-bit RGB, no filter, one data chunk)."""
    height, width, _ = pixels.shape
    lines = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)

    def chunk(kind: bytes, content: bytes) -> bytes:
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(lines.tobytes(), 9))
        + chunk(b"IEND", b"")
    )


def figure(picture: bytes, caption: str, width: int, kind: str = "png", smooth: bool = False) -> str:
    """A picture with its caption as HTML, `width` CSS pixels wide; nothing is fetched from anywhere."""
    rendering = "auto" if smooth else "pixelated"
    data = base64.b64encode(picture).decode("ascii")
    return (
        f'<figure style="display:inline-block;margin:4px;text-align:center">'
        f'<img alt="{html.escape(caption)}" width="{width}" style="image-rendering:{rendering}" '
        f'src="data:image/{kind};base64,{data}">'
        f'<figcaption style="font-size:11px">{html.escape(caption)}</figcaption></figure>'
    )


def page(title: str, figures: Sequence[str]) -> str:
    """Figures under a title."""
    return f"<div><p><b>{html.escape(title)}</b></p>{''.join(figures)}</div>"


def result_page(
    heatmaps: np.ndarray | None, head_weights: np.ndarray, captions: Sequence[str], most: int = 8
) -> str:
    """The maps of a batch and the share of each head, mean over the batch.

    Args:
        heatmaps: `(batch, grid_h, grid_w)`; None, or `(batch, tokens)`, for a model without a picture.
        head_weights: `(batch, layers, heads)`.
        captions: One per image.
        most: Show at most so many images.
    """
    figures = []
    if heatmaps is not None:
        # Relevance per token of a sequence is a strip, one row high.
        maps = heatmaps if heatmaps.ndim == 3 else heatmaps[:, None, :]
        for grid, caption in zip(maps[:most], captions, strict=False):
            figures.append(figure(png(heat(grid)), caption, 112))
    count, layers, heads = head_weights.shape
    means = np.full((layers, heads), np.nan)
    known = np.isfinite(head_weights).any(0)
    means[known] = np.nanmean(head_weights[:, known], axis=0)
    figures.append(
        figure(png(heat(means)), "head importance: a row per layer, a column per head", 12 * heads)
    )
    more = f", {most} of them shown" if heatmaps is not None and count > most else ""
    return page(f"GMAR: {count} image{'s' if count > 1 else ''}{more}, {layers} layers", figures)
