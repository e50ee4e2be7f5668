"""One probe to whatever logger is there: W&B gets everything, TensorBoard most, the others the numbers."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gmar_lightning.show import keys

# W&B truncates a list of images here, silently.
_MOST_IMAGES = 108


@dataclass(frozen=True, eq=False)
class Publication:
    """What one probe shows.

    Attributes:
        step: The logger's x, as Lightning's own training rows have it.
        scalars: Name to number; NaN where there is none this time.
        hidden: Names among the scalars that get no panel of their own.
        heatmaps: Overlays, uint8 `(height, width, 3)` each, in probe order; empty when media are thinned out.
        captions: One per overlay.
        inputs: The clean photographs, at the first probe only.
        grids: Name to picture, uint8 `(height, width, 3)`.
        importance: Relative shares of all heads, for the histogram; empty when media are thinned out.
    """

    step: int
    scalars: Mapping[str, float]
    hidden: frozenset[str] = frozenset()
    heatmaps: Sequence[np.ndarray] = ()
    captions: Sequence[str] = ()
    inputs: Sequence[np.ndarray] = ()
    grids: Mapping[str, np.ndarray] = field(default_factory=dict)
    importance: np.ndarray = field(default_factory=lambda: np.empty(0))


def open_logger(
    logger: Any, settings: Mapping[str, Any], scalars: Sequence[str], hidden: frozenset[str]
) -> None:
    """Announce names and settings before the first publication; needed by W&B alone."""
    if not _is(logger, "WandbLogger"):
        return
    run = logger.experiment
    run.config.update({"gmar": dict(settings)}, allow_val_change=True)
    # Every key by its exact name: overlapping globs are resolved at random, and a run that existed before
    # the logger has no step metric at all.
    run.define_metric(keys.STEP)
    for name in (*scalars, *keys.of_kind("pictures", "picture")):
        key = _prefixed(logger, name)
        if name in hidden:
            run.define_metric(key, step_metric=keys.STEP, hidden=True, summary="none")
        else:
            run.define_metric(key, step_metric=keys.STEP)
    run.define_metric(_prefixed(logger, keys.IMPORTANCE_HISTOGRAM), step_metric=keys.STEP)


def publish(logger: Any, shown: Publication) -> None:
    """Hand one probe to a logger: a single `log_metrics` call, so that all of it shares one row."""
    if _is(logger, "WandbLogger"):
        finite = {name: value for name, value in shown.scalars.items() if math.isfinite(value)}
        logger.log_metrics({**finite, **_wandb_media(shown)}, step=shown.step)
        return
    logger.log_metrics(dict(shown.scalars), step=shown.step)
    if _is(logger, "TensorBoardLogger"):
        _tensorboard_media(logger.experiment, shown)


def shows_pictures(logger: Any) -> bool:
    """Whether `publish` sends this logger pictures, not only numbers."""
    return _is(logger, "WandbLogger") or _is(logger, "TensorBoardLogger")


def raise_alert(logger: Any, title: str, text: str) -> None:
    """One W&B alert; the title stays the same because the server groups alerts by it."""
    if _is(logger, "WandbLogger"):
        logger.experiment.alert(title=title, text=text, level="WARN")


def close_logger(
    logger: Any, step: int, rows: Sequence[Sequence[Any]], report: Path | None, summary: Mapping[str, Any]
) -> None:
    """At fit end: the table of all heads over all probes, the report, and the summary; W&B alone.

    Args:
        logger: The logger.
        step: The logger's x.
        rows: `(step, layer, head, importance, share, flagged)` for each probe and head.
        report: The HTML report, if it was written.
        summary: Summary keys of the run.
    """
    if not _is(logger, "WandbLogger"):
        return
    import wandb

    columns: list[str | int] = ["step", "layer", "head", "importance", "share", "flagged"]
    last: dict[str, Any] = {keys.HEAD_TABLE: wandb.Table(columns=columns, data=[list(row) for row in rows])}
    if report is not None:
        last[keys.REPORT] = wandb.Html(report.read_text(encoding="utf-8"), inject=False)
    logger.log_metrics(last, step=step)
    logger.experiment.summary.update({_prefixed(logger, key): value for key, value in summary.items()})


def offline_run(loggers: Sequence[Any]) -> Path | None:
    """Folder of the first offline W&B run among the loggers, relative to the working directory."""
    for logger in loggers:
        if _is(logger, "WandbLogger") and getattr(logger.experiment, "offline", False):
            return Path(os.path.relpath(logger.experiment.settings.sync_dir))
    return None


def _wandb_media(shown: Publication) -> dict[str, Any]:
    import wandb

    media: dict[str, Any] = {}
    for name, images in ((keys.HEATMAPS, shown.heatmaps), (keys.INPUTS, shown.inputs)):
        if len(images):
            media[name] = [
                wandb.Image(image, caption=caption, file_type="jpg")
                for image, caption in zip(images[:_MOST_IMAGES], shown.captions, strict=False)
            ]
    media.update({name: wandb.Image(picture, file_type="png") for name, picture in shown.grids.items()})
    finite = shown.importance[np.isfinite(shown.importance)]
    if finite.size:
        # A fixed range, in fair shares, so that the rows of all steps line up.
        counts = np.histogram(np.clip(finite, 0, 4), bins=32, range=(0, 4))
        media[keys.IMPORTANCE_HISTOGRAM] = wandb.Histogram(np_histogram=counts)
    return media


def _tensorboard_media(writer: Any, shown: Publication) -> None:
    for name, images in ((keys.HEATMAPS, shown.heatmaps), (keys.INPUTS, shown.inputs)):
        if len(images):
            writer.add_images(name, np.stack(images), shown.step, dataformats="NHWC")
    for name, picture in shown.grids.items():
        writer.add_image(name, picture, shown.step, dataformats="HWC")
    finite = shown.importance[np.isfinite(shown.importance)]
    if finite.size:
        writer.add_histogram(keys.IMPORTANCE_HISTOGRAM, finite, shown.step)


def _is(logger: Any, name: str) -> bool:
    # By name: `lightning` and `pytorch_lightning` each have their own class.
    return any(kind.__name__ == name for kind in type(logger).__mro__)


def _prefixed(logger: Any, name: str) -> str:
    prefix = getattr(logger, "_prefix", "")
    return f"{prefix}{logger.LOGGER_JOIN_CHAR}{name}" if prefix else name
