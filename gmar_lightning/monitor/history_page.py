"""How a record shows itself in a notebook."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gmar_lightning.explain.notebook import figure, heat, page, png

if TYPE_CHECKING:
    from gmar_lightning.monitor.history import History


def history_page(history: History) -> str:
    """The pictures of the last probe that has some, and every head over the probes, as HTML."""
    drawn = history.dir / "heatmaps"
    last = next((r for r in reversed(history.records) if (drawn / str(r.stored_maps)).is_dir()), None)
    files = sorted((drawn / str(last.stored_maps)).glob("*.jpg")) if last else history.input_paths()
    figures = [figure(path.read_bytes(), f"#{int(path.stem)}", 160, "jpeg", smooth=True) for path in files]
    shares = history.shares()
    if shares.size:
        rows = shares.reshape(len(shares), -1).T
        figures.append(figure(png(heat(rows)), "share of each head (rows) at each probe (columns)", 480))
    where = f"last at step {history.records[-1].step}" if history.records else "none yet"
    title = f"{len(history.records)} probes, {where}, {len(history.events)} events: {history.dir}"
    return page(title, figures)
