"""Text for a terminal: colours where there is one, and a progress bar on what takes longer than two seconds."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, TypeVar

import numpy as np
from tqdm import tqdm

T = TypeVar("T")
_CODES = {"red": "31", "green": "32", "yellow": "33", "dim": "2", "bold": "1"}
# Blocks of eight heights; a share is drawn as high as it is against twice its fair share.
_BLOCKS = " ▁▂▃▄▅▆▇█"


def has_colours(stream: TextIO) -> bool:
    """Whether the stream is a terminal that colours are wanted on (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def coloured(text: str, colour: str, stream: TextIO | None = None) -> str:
    """The text in a colour, or as it is where the stream is no terminal."""
    shown = sys.stdout if stream is None else stream
    return f"\033[{_CODES[colour]}m{text}\033[0m" if has_colours(shown) else text


def plain(text: str) -> str:
    """The text with everything that a terminal would obey, or hide, written out: escape sequences, line breaks.

    For names that others gave: of files, classes, metrics, runs.
    """
    joiners = "\u200c\u200d"  # of scripts and emoji, harmless
    return "".join(
        c if c.isprintable() or c in joiners else c.encode("unicode_escape", "backslashreplace").decode()
        for c in text
    )


def progress(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """The items, under a bar on the error stream if that is a terminal and two seconds went by."""
    bar: Any = tqdm(items, what, total, leave=False, delay=2, disable=not sys.stderr.isatty())
    yield from bar


def raster(shares: np.ndarray, flagged: Iterable[tuple[int, int]], stream: TextIO | None = None) -> list[str]:
    """Layers x heads as lines of blocks: full is twice a fair share, `x` a flagged head.

    Args:
        shares: Share of the layer's importance, `(layers, heads)`; NaN where there is no head.
        flagged: `(layer, head)` of every head flagged now.
        stream: Where it will be shown.
    """
    crossed = set(flagged)
    counts = np.isfinite(shares).sum(1, keepdims=True)
    heights = np.nan_to_num(np.clip(shares * counts / 2, 0, 1) * (len(_BLOCKS) - 1)).round().astype(int)
    lines = []
    for layer, row in enumerate(heights):
        cells = [
            coloured("x", "red", stream) if (layer, head) in crossed else _BLOCKS[height]
            for head, height in enumerate(row[: counts[layer, 0]])
        ]
        lines.append(f"  L{layer:02d} {''.join(cells)}")
    return lines
