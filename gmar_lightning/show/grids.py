"""Pictures of the heads: the grid of one probe and the raster of a whole run. uint8 `(height, width, 3)`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from gmar_lightning.show.colour import HEAT

_PAPER = (255, 255, 255)
_INK = (40, 44, 52)
_FAINT = (120, 126, 136)
_MISSING = (214, 217, 222)
_STRIPE = (182, 187, 195)


@dataclass(frozen=True)
class Scale:
    """How values become colours, and what stands beside the colour bar.

    Attributes:
        title: Above the picture.
        unit: Above the bar.
        marks: `(place, text)` along the bar, places from 0 (dark) to 1 (light).
    """

    title: str
    unit: str
    marks: tuple[tuple[float, str], ...]


def importance_grid(
    shares: np.ndarray,
    flagged: Sequence[Sequence[int]] = (),
    layers: Sequence[str] | None = None,
    top: float = 3.0,
) -> np.ndarray:
    """Every head's share of its layer as a cell, on a scale that never changes.

    Args:
        shares: `(layers, heads)`, sum 1 over the heads of a layer; NaN where a layer has no such head
            or nothing was measured.
        flagged: `(layer, head)` pairs to cross out.
        layers: names for the rows, shortened to what tells them apart; numbers by default.
        top: end of the colour scale, in fair shares (1 = what each head has when all are equal).

    Returns:
        uint8 `(height, width, 3)`.
    """
    return _head_grid(relative_shares(shares) / top, flagged, layers, _share_scale("by head", top))


def contribution_grid(
    contribution: np.ndarray,
    flagged: Sequence[Sequence[int]] = (),
    layers: Sequence[str] | None = None,
    top: float | None = None,
) -> np.ndarray:
    """Every head's contribution to the explained score as a cell; heads of all layers are comparable.

    Args:
        contribution: `(layers, heads)`, mean over the images of its absolute value; NaN where there is none.
        flagged: `(layer, head)` pairs to cross out.
        layers: names for the rows.
        top: end of the colour scale; by default the largest contribution here.

    Returns:
        uint8 `(height, width, 3)`.
    """
    unit, scale = _contribution_units(contribution, "by head", top)
    return _head_grid(unit, flagged, layers, scale)


def evolution_raster(
    shares: np.ndarray,
    steps: Sequence[int] | np.ndarray,
    events: Sequence[Mapping[str, Any]] = (),
    layers: Sequence[str] | None = None,
    top: float = 3.0,
) -> np.ndarray:
    """The whole history in one picture: a row per head, grouped by layer, a column per probe.

    A head that collapses leaves a dark streak. At most 480 columns are drawn; of more probes, neighbours
    are averaged.

    Args:
        shares: `(probes, layers, heads)`; NaN rows are probes that failed.
        steps: `(probes,)`.
        events: flags with `kind`, `step`, `layer` and `head`; collapses are marked on their row.
        layers: names for the rows.
        top: end of the colour scale, in fair shares.

    Returns:
        uint8 `(height, width, 3)`.
    """
    relative = relative_shares(shares) / top if len(shares) else shares
    return _raster(relative, steps, events, layers, _share_scale("every head over time", top))


def contribution_raster(
    contribution: np.ndarray,
    steps: Sequence[int] | np.ndarray,
    events: Sequence[Mapping[str, Any]] = (),
    layers: Sequence[str] | None = None,
    top: float | None = None,
) -> np.ndarray:
    """As `evolution_raster`, with the heads' contributions `(probes, layers, heads)` as `contribution_grid`."""
    unit, scale = _contribution_units(contribution, "every head over time", top)
    return _raster(unit, steps, events, layers, scale)


def _share_scale(what: str, top: float) -> Scale:
    marks = tuple((mark / top, f"{mark}x") for mark in range(int(top) + 1))
    return Scale(f"share of the layer, {what}", "fair share", marks)


def _contribution_units(values: np.ndarray, what: str, top: float | None) -> tuple[np.ndarray, Scale]:
    known = values[np.isfinite(values)]
    top = float(known.max()) if top is None and known.size else top or 1.0
    # Every head at zero (a fresh head on a frozen model): an empty scale, not a division by zero.
    top = top if top > 0 else 1.0
    # contributions spread over orders of magnitude: by their square root weak heads can still be told apart
    unit = np.sqrt(np.clip(np.asarray(values, dtype=np.float64), 0, None) / top)
    marks = ((0.0, "0"), (0.5, f"{top / 4:.2g}"), (1.0, f"{top:.2g}"))
    return unit, Scale(f"contribution, {what}", "of the score", marks)


def _head_grid(
    unit: np.ndarray, flagged: Sequence[Sequence[int]], layers: Sequence[str] | None, scale: Scale
) -> np.ndarray:
    rows, columns = unit.shape
    # The picture keeps a size that a dashboard's panel shows whole, from 2 x 2 to 48 x 48 heads.
    cell = int(np.clip(420 // max(rows, columns, 1), 14, 28))
    names = short_names(layers) if layers else [str(row) for row in range(rows)]
    font, left, head_room = _font(11), 34 + _text_width(names, _font(11)), 40
    width, height = left + max(columns * cell, 150) + 78, head_room + rows * cell + 34
    canvas = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((left, 8), scale.title, fill=_INK, font=_font(12))
    crossed = {(int(layer), int(head)) for layer, head in flagged}
    for row in range(rows):
        y = head_room + row * cell
        draw.text((left - 6, y + cell // 2), names[row], fill=_INK, font=font, anchor="rm")
        for column in range(columns):
            box = (left + column * cell, y, left + (column + 1) * cell - 2, y + cell - 2)
            _draw_cell(draw, box, unit[row, column], (row, column) in crossed)
    for column in range(0, columns, 1 if cell >= 18 else 2):
        centre = left + column * cell + cell // 2 - 1
        draw.text((centre, head_room + rows * cell + 4), str(column), fill=_FAINT, font=font, anchor="mt")
    draw.text((left, height - 14), "head", fill=_FAINT, font=font)
    _vertical_label(canvas, "layer", 4, head_room + rows * cell // 2)
    _colour_bar(draw, width - 62, head_room, max(rows * cell - 2, 60), scale)
    return np.asarray(canvas)


def _raster(
    unit: np.ndarray,
    steps: Sequence[int] | np.ndarray,
    events: Sequence[Mapping[str, Any]],
    layers: Sequence[str] | None,
    scale: Scale,
) -> np.ndarray:
    probes, depth, heads = max(len(unit), 1), unit.shape[1], unit.shape[2]
    unit = unit if len(unit) else np.full((1, depth, heads), np.nan)
    real = [int(np.isfinite(unit[:, layer]).any(axis=0).sum()) or heads for layer in range(depth)]
    row_height = int(np.clip(560 // max(sum(real), 1), 2, 12))
    edges = _column_edges(probes)
    names = short_names(layers) if layers else [str(layer) for layer in range(depth)]
    left, head_room = 34 + _text_width(names, _font(11)), 40
    plot_width, plot_height = int(edges[-1]), row_height * sum(real) + 3 * depth
    canvas = Image.new("RGB", (left + max(plot_width, 260) + 78, head_room + plot_height + 36), _PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((left, 8), scale.title, fill=_INK, font=_font(12))
    tops = head_room + np.concatenate([[0], np.cumsum([row_height * count + 3 for count in real])])
    previous = -12
    for layer in range(depth):
        block = _raster_block(unit[:, layer, : real[layer]].T, edges, row_height)
        canvas.paste(Image.fromarray(block), (left, int(tops[layer])))
        middle = int(tops[layer] + row_height * real[layer] / 2)
        # The height of a line of text: names of thin layers are left out rather than printed over one
        # another.
        if middle - previous >= 12:
            draw.text((left - 6, middle), names[layer], fill=_INK, font=_font(11), anchor="rm")
            previous = middle
    for event in events:
        if event["kind"] == "collapsed" and event.get("head") is not None:
            y = int(tops[event["layer"]] + row_height * (event["head"] + 0.5))
            _mark(draw, left + _column_of(event["step"], steps, edges), y)
    _step_axis(draw, left, head_room + plot_height, steps, edges)
    _vertical_label(canvas, "layer", 4, head_room + plot_height // 2)
    _colour_bar(draw, canvas.width - 62, head_room, max(min(plot_height, 300), 60), scale)
    return np.asarray(canvas)


def relative_shares(shares: np.ndarray) -> np.ndarray:
    """Shares `(..., layers, heads)` in fair shares: 1 is what each head of the layer has when all are equal."""
    values = np.asarray(shares, dtype=np.float64)
    return values * np.isfinite(values).sum(axis=-1, keepdims=True)


def short_names(names: Sequence[str]) -> list[str]:
    """Names without the beginning and the end that all share, cut at dots: `blocks.3.attn` -> `3`."""
    parts = [name.split(".") for name in names]
    while len({tuple(p[:1]) for p in parts}) == 1 and min(map(len, parts)) > 1:
        parts = [p[1:] for p in parts]
    while len({tuple(p[-1:]) for p in parts}) == 1 and min(map(len, parts)) > 1:
        parts = [p[:-1] for p in parts]
    joined = [".".join(p) for p in parts]
    stem = joined[0].rstrip("0123456789")
    if (
        len(joined) > 1
        and stem
        and all(name.startswith(stem) and name[len(stem) :].isdigit() for name in joined)
    ):
        joined = [name[len(stem) :] for name in joined]
    return [name if len(name) <= 14 else "…" + name[-13:] for name in joined]


def _colours(unit: np.ndarray) -> np.ndarray:
    index = np.clip(np.nan_to_num(unit, nan=0.0) * 255, 0, 255).astype(np.uint8)
    return np.where(np.isfinite(unit)[..., None], HEAT[index], np.array(_MISSING, dtype=np.uint8))


def _draw_cell(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], value: float, crossed: bool):
    x0, y0, x1, y1 = box
    if not np.isfinite(value):
        draw.rectangle(box, fill=_MISSING)
        draw.line((x0, y1, x1, y0), fill=_STRIPE)
        return
    colour = _colours(np.array(value))
    draw.rectangle(box, fill=tuple(int(c) for c in colour))
    if crossed:
        # Flagged heads are mostly dark, so mostly crossed out in white; a flagged head that is light needs
        # black.
        pen = (255, 255, 255) if colour.mean() < 140 else (0, 0, 0)
        draw.line((x0 + 3, y0 + 3, x1 - 3, y1 - 3), fill=pen, width=2)
        draw.line((x0 + 3, y1 - 3, x1 - 3, y0 + 3), fill=pen, width=2)


def _raster_block(relative: np.ndarray, edges: np.ndarray, row_height: int) -> np.ndarray:
    columns = np.searchsorted(edges, np.arange(edges[-1]), side="right") - 1
    if len(edges) - 1 < relative.shape[1]:
        relative = _average_columns(relative, len(edges) - 1)
    return np.repeat(_colours(relative)[:, columns], row_height, axis=0)


def _average_columns(values: np.ndarray, count: int) -> np.ndarray:
    bins = np.arange(values.shape[1]) * count // values.shape[1]
    starts = np.flatnonzero(np.diff(bins, prepend=-1))
    known = np.isfinite(values)
    sums = np.add.reduceat(np.where(known, values, 0.0), starts, axis=1)
    # Means over the finite values alone: one failed probe leaves no hole where its neighbours are known.
    counts = np.add.reduceat(known.astype(np.float64), starts, axis=1)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _column_edges(probes: int) -> np.ndarray:
    # Bounded: the raster is drawn at every logged probe of a run of any length.
    columns = min(max(probes, 1), 480)
    width = int(np.clip(720 // columns, 1, 24))
    return np.arange(columns + 1) * width


def _column_of(step: int, steps: Sequence[int] | np.ndarray, edges: np.ndarray) -> int:
    probe = int(np.searchsorted(np.asarray(steps), step))
    column = probe * (len(edges) - 1) // max(len(steps), 1)
    return int(edges[min(column, len(edges) - 2)] + edges[1] // 2)


def _step_axis(
    draw: ImageDraw.ImageDraw, left: int, y: int, steps: Sequence[int] | np.ndarray, edges: np.ndarray
):
    count = len(steps)
    for probe in np.unique(np.linspace(0, count - 1, min(count, 8)).astype(int)) if count else ():
        x = left + _column_of(int(steps[probe]), steps, edges)
        draw.line((x, y, x, y + 4), fill=_FAINT)
        draw.text((x, y + 6), str(int(steps[probe])), fill=_FAINT, font=_font(11), anchor="mt")
    draw.text((left, y + 20), "step", fill=_FAINT, font=_font(11))


def _mark(draw: ImageDraw.ImageDraw, x: int, y: int):
    draw.polygon([(x - 5, y - 4), (x - 5, y + 4), (x + 2, y)], fill=(255, 255, 255), outline=(0, 0, 0))


def _colour_bar(draw: ImageDraw.ImageDraw, x: int, y: int, height: int, scale: Scale):
    for offset in range(height):
        colour = HEAT[255 - offset * 255 // max(height - 1, 1)]
        draw.line((x, y + offset, x + 11, y + offset), fill=tuple(int(c) for c in colour))
    for place, text in scale.marks:
        at = y + height - 1 - int(place * (height - 1))
        draw.line((x + 12, at, x + 15, at), fill=_FAINT)
        draw.text((x + 18, at), text, fill=_FAINT, font=_font(11), anchor="lm")
    draw.text((x - 4, y - 24), scale.unit, fill=_FAINT, font=_font(10))


def _vertical_label(canvas: Image.Image, text: str, x: int, middle: int):
    width = int(_font(11).getlength(text)) + 2
    label = Image.new("RGB", (width, 14), _PAPER)
    ImageDraw.Draw(label).text((1, 0), text, fill=_FAINT, font=_font(11))
    canvas.paste(label.rotate(90, expand=True), (x, middle - width // 2))


def _text_width(names: Sequence[str], font: Any) -> int:
    return int(max((font.getlength(name) for name in names), default=0))


@cache
def _font(size: int) -> Any:
    return ImageFont.load_default(size)
