"""What the benchmarks share: heatmaps of every method, their scores per image, tables with standard errors."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from gmar_lightning.explain.explained import runner_up
from gmar_lightning.explain.faithfulness import (
    probability_area,
    relative_drop,
    salience_coefficient,
)
from gmar_lightning.explain.gmar import gmar
from gmar_lightning.explain.localisation import energy_in_mask, pointing_game
from gmar_lightning.explain.perturbation import perturbing
from gmar_lightning.explain.sanity import rank_correlation, shuffled_top_block

METHODS = {
    "last-layer attention": {"norm": "uniform", "rollout": "last_layer"},
    "rollout (flow, uniform)": {"norm": "uniform", "rollout": "flow"},
    "GMAR paper L1": {"norm": "l1", "rollout": "paper"},
    "GMAR paper L2": {"norm": "l2", "rollout": "paper"},
    "GMAR flow L1": {"norm": "l1", "rollout": "flow"},
    "gradient-gated uniform (Chefer 2021)": {"norm": "uniform", "rollout": "gradient"},
    "gradient-gated GMAR L1": {"norm": "l1", "rollout": "gradient"},
}

Maps = Callable[[torch.nn.Module, Tensor, Tensor], Mapping[str, Tensor]]
Scores = dict[str, dict[str, list[float]]]  # method -> metric -> one value per image


def method_maps(model, images, targets, methods=METHODS):
    """Heatmaps of every method, `(batch, grid_h, grid_w)` each, random and centre prior first."""
    norms = {form["norm"] for form in methods.values()}
    forms = sorted({form["rollout"] for form in methods.values()})
    found = {norm: gmar(model, images, targets, norm=norm, rollout=forms).maps for norm in norms}
    drawn = {name: found[form["norm"]][form["rollout"]] for name, form in methods.items()}
    shape = next(iter(drawn.values())).shape
    # The seed is the images' content, so that no image meets the same noise as another and runs repeat.
    seed = int(images.double().abs().sum() * 1000) % 2**31
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return {"random": noise, "centre prior": centre_prior(*shape), **drawn}


def centre_prior(batch, height, width):
    """A Gaussian in the middle of the picture, a quarter of its side wide."""
    rows = ((torch.arange(height) + 0.5) / height - 0.5) / 0.25
    columns = ((torch.arange(width) + 0.5) / width - 0.5) / 0.25
    return torch.exp(-0.5 * (rows[:, None] ** 2 + columns**2)).expand(batch, -1, -1)


def score(model, images, targets, maps, *, steps, groups, attention, masks=None):
    """Scores of several maps of one batch, `{method: {metric: values (batch,)}}`; `steps` of 0: by masks alone.

    Pixel removal is that of the sources: insertion from blur, deletion to the mean colour, average drop
    against the mean colour, SaCo (`groups` of 0 leaves it out) to the mean colour. With `attention`,
    insertion, deletion and SaCo hide tokens instead.
    """
    first = next(iter(maps.values()))
    found = {name: {} for name in maps}
    inserted = "attention" if attention else "blur"
    with (
        perturbing(model, images, first, targets, baseline="mean") as grey,
        perturbing(model, images, first, targets, baseline=inserted) as other,
    ):
        removing = other if attention else grey
        for name, drawn in maps.items():
            values = found[name]
            if steps:
                values["insertion"] = probability_area(other, drawn, steps, insert=True)
                values["deletion"] = probability_area(removing, drawn, steps, insert=False)
                values["ins - del"] = values["insertion"] - values["deletion"]
            if steps and not attention:
                values["avg drop"] = relative_drop(grey, drawn)
            if groups:
                values["SaCo"] = salience_coefficient(removing, drawn, groups)
    if masks is not None:
        for name, drawn in maps.items():
            found[name]["energy"] = energy_in_mask(drawn, masks)
            found[name]["pointing"] = pointing_game(drawn, masks)
    return found


def sanity(model, images, targets, maps):
    """Rank correlation of each method's map with its map of another class, and of another model; 1 is blind to it.

    `class` explains the runner-up class instead, `weights` the same class after every tensor of the top block was
    shuffled (`gmar_lightning.explain.sanity`). `{method: {metric: values (batch,)}}`.
    """
    with torch.no_grad():
        others = runner_up(model(images), targets)
    layer = gmar(model, images[:1], targets[:1]).layers[-1]
    by_class = method_maps(model, images, others)
    with shuffled_top_block(model, layer):
        by_weights = method_maps(model, images, targets)
    return {
        name: {
            "class": rank_correlation(drawn, by_class[name]),
            "weights": rank_correlation(drawn, by_weights[name]),
        }
        for name, drawn in maps.items()
    }


def collect(scores: Scores, batch) -> None:
    """Append the values of a batch."""
    for name, metrics in batch.items():
        for metric, values in metrics.items():
            scores.setdefault(name, defaultdict(list)).setdefault(metric, []).extend(values.tolist())


def standard_error(values):
    """Mean and standard error over images, NaN left out."""
    known = np.asarray(values, float)
    known = known[np.isfinite(known)]
    if len(known) < 2:
        return math.nan, math.nan
    return known.mean(), known.std(ddof=1) / math.sqrt(len(known))


def table(scores: Scores, against: str | None = None) -> str:
    """A Markdown table, mean ± standard error; with `against`, of the paired differences to that method."""
    metrics = list(next(iter(scores.values())))
    lines = [f"| map | {' | '.join(metrics)} |", "|---" * (len(metrics) + 1) + "|"]
    for name, values in scores.items():
        if name == against:
            continue
        cells = []
        for metric in metrics:
            column = np.asarray(values[metric], float)
            if against is not None:
                column = column - np.asarray(scores[against][metric], float)
            mean, error = standard_error(column)
            cells.append(f"{mean:{'+' if against else ''}.3f} ± {error:.3f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
