"""How far a heatmap can be trusted: what happens to the prediction when the model loses what it marks.

Every function takes a batch and returns one value per image; NaN for an image whose heatmap is not finite.
"Probability" is that of the explained class: by softmax, unless the scores are of another kind (`output.kind_of`);
where `targets` is a callable, its number, in its own unit.
A cell is one element of the heatmap's grid, removed as a whole. What replaces it changes rankings, so report it:

- "black": pixel value 0 before normalisation (give `mean` and `std` if the images are normalised);
- "mean", "blur": the image's own mean colour; the image under a Gaussian blur as wide as a cell;
- "attention": pixels stay, and no token attends to a removed patch any more, in any layer; for models that read a
  class token or an attention pool. A grey patch is something a model was not trained on, a hidden one is not there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmar_lightning.explain.gmar import gmar
from gmar_lightning.explain.inputs import Goal
from gmar_lightning.explain.output import Output
from gmar_lightning.explain.perturbation import (
    PIXEL_BASELINES,
    Baseline,
    Perturbation,
    check_baseline,
    perturbing,
)

Images = Tensor | Mapping[str, Any]
Channels = Sequence[float] | None


def insertion(
    model: nn.Module,
    images: Images,
    heatmaps: Tensor,
    targets: Goal,
    *,
    steps: int = 10,
    baseline: Baseline = "blur",
    mean: Channels = None,
    std: Channels = None,
) -> Tensor:
    """Area under the probability as cells appear, hottest first (RISE, Petsiuk et al. 2018).

    `integral_0^1 p(f) df`, with `p(f)` the probability when the fraction `f` of cells that the heatmap ranks
    highest is shown, by the trapezoidal rule over `steps` equal parts. Higher is better. Equal cells: scattered.

    Cost: `steps + 1` forwards per image; "attention" one more.

    Args:
        model: As for `gmar`.
        images: `(batch, channels, height, width)`.
        heatmaps: `(batch, grid_h, grid_w)`.
        targets: `(batch,)` class indices, or a callable.
        steps: Parts that the cells are added in; at most one per cell.
        baseline: What a cell shows before it appears.
        mean: Channel means that the images were normalised with; only "black" needs them.
        std: Channel standard deviations, likewise.

    Returns:
        `(batch,)` in [0, 1].

    Raises:
        ValueError: For arguments that do not fit.
        UnsupportedModelError: When "attention" cannot hide tokens from this model.
    """
    check_steps(steps)
    with perturbing(model, images, heatmaps, targets, baseline=baseline, mean=mean, std=std) as probe:
        return _where_finite(heatmaps, probability_area(probe, heatmaps, steps, insert=True))


def deletion(
    model: nn.Module,
    images: Images,
    heatmaps: Tensor,
    targets: Goal,
    *,
    steps: int = 10,
    baseline: Baseline = "mean",
    mean: Channels = None,
    std: Channels = None,
) -> Tensor:
    """Area under the probability as cells vanish, hottest first (RISE, Petsiuk et al. 2018); lower is better.

    As `insertion`, with the fraction `f` of hottest cells removed. Cost: `steps + 1` forwards per image.
    """
    check_steps(steps)
    with perturbing(model, images, heatmaps, targets, baseline=baseline, mean=mean, std=std) as probe:
        return _where_finite(heatmaps, probability_area(probe, heatmaps, steps, insert=False))


def average_drop(
    model: nn.Module,
    images: Images,
    heatmaps: Tensor,
    targets: Goal,
    *,
    baseline: Baseline = "black",
    mean: Channels = None,
    std: Channels = None,
) -> Tensor:
    """Relative loss of probability when only what the heatmap marks is shown (Grad-CAM++, 2018).

    `max(0, Y - O) / Y`, with `Y` the probability on the image and `O` on the image times its heatmap (scaled
    to [0, 1] and bilinearly enlarged; the rest is the baseline). Lower is better; as a fraction, not in
    percent. A map that is hot everywhere drops nothing: read it beside insertion and deletion. A map without
    any contrast shows nothing. Cost: 2 forwards per image.

    Args:
        model: As for `gmar`.
        images: `(batch, channels, height, width)`.
        heatmaps: `(batch, grid_h, grid_w)`.
        targets: `(batch,)` class indices, or a callable.
        baseline: "black" (the source's choice), "mean" or "blur".
        mean: Channel means that the images were normalised with; only "black" needs them.
        std: Channel standard deviations, likewise.

    Returns:
        `(batch,)` in [0, 1].

    Raises:
        ValueError: For arguments that do not fit.
    """
    check_baseline(baseline, mean, std, allowed=PIXEL_BASELINES)
    with perturbing(model, images, heatmaps, targets, baseline=baseline, mean=mean, std=std) as probe:
        return _where_finite(heatmaps, relative_drop(probe, heatmaps))


def average_increase(
    model: nn.Module,
    images: Images,
    heatmaps: Tensor,
    targets: Goal,
    *,
    baseline: Baseline = "black",
    mean: Channels = None,
    std: Channels = None,
) -> Tensor:
    """Whether the probability rises when only what the heatmap marks is shown (Grad-CAM++, 2018).

    1 where `O > Y`, else 0, with `Y` and `O` as in `average_drop`; its mean over images is the average
    increase. Higher is better. Cost: 2 forwards per image.
    """
    check_baseline(baseline, mean, std, allowed=PIXEL_BASELINES)
    with perturbing(model, images, heatmaps, targets, baseline=baseline, mean=mean, std=std) as probe:
        increased = probe.blending(_shown(heatmaps, probe)) > probe.intact
        return _where_finite(heatmaps, increased.float())


def saco(
    model: nn.Module,
    images: Images,
    heatmaps: Tensor,
    targets: Goal,
    *,
    groups: int = 10,
    baseline: Baseline = "mean",
    mean: Channels = None,
    std: Channels = None,
) -> Tensor:
    """Salience-guided faithfulness coefficient (SaCo, Wu et al. 2024, arXiv 2404.01415).

    Cells are sorted by heat into `groups` groups of equal size; each group alone is removed. With `s_i` the
    heat of group i and `d_i` the fall in probability it causes, every pair `i < j` counts with its difference
    in heat: `sum w_ij / sum |w_ij|`, `w_ij = s_i - s_j` if `d_i >= d_j`, else `-(s_i - s_j)`. So a heatmap is
    judged by how much hotter it says one part is than another, not only by its ranking. 1 is perfectly
    faithful, -1 perfectly wrong, and a random map is near 0; a map without contrast scores 0. Heat of a group
    is its mean, which is the same coefficient when sizes are equal.

    Cost: `groups + 1` forwards per image; "attention" two more.

    Args:
        model: As for `gmar`.
        images: `(batch, channels, height, width)`.
        heatmaps: `(batch, grid_h, grid_w)`.
        targets: `(batch,)` class indices, or a callable.
        groups: Number of groups, 10 in the source.
        baseline: What a removed cell shows; the image's mean in the source.
        mean: Channel means that the images were normalised with; only "black" needs them.
        std: Channel standard deviations, likewise.

    Returns:
        `(batch,)` in [-1, 1].

    Raises:
        ValueError: For arguments that do not fit.
        UnsupportedModelError: When "attention" cannot hide tokens from this model.
    """
    cells = heatmaps[0].numel() if len(heatmaps) else 0
    if not 2 <= groups <= cells:
        raise ValueError(f"groups must lie between 2 and the {cells} cells of the heatmap, got {groups}")
    with perturbing(model, images, heatmaps, targets, baseline=baseline, mean=mean, std=std) as probe:
        return _where_finite(heatmaps, salience_coefficient(probe, heatmaps, groups))


def live_faithfulness(
    model: nn.Module, images: Images, targets: Goal, heatmaps: Tensor, *, seed: int = 0, **settings: Any
) -> dict[str, float]:
    """Means over the images of `faithfulness_per_image`, with random maps drawn from `seed`; NaN without any.

    Args:
        model: As for `gmar`; so are `images` and `targets`, and `heatmaps` are those in question.
        images: `(batch, channels, height, width)`.
        targets: `(batch,)`.
        heatmaps: `(batch, grid_h, grid_w)`.
        seed: Of the random maps.
        settings: `rollout`, `steps`, `baseline`, `mean` and `std` of `faithfulness_per_image`.
    """
    noise = random_maps(heatmaps.shape, seed)
    values = faithfulness_per_image(model, images, targets, heatmaps, noise, **settings)
    return {name: float(each.nanmean()) for name, each in values.items()}


def random_maps(shape: Sequence[int], seed: int = 0) -> Tensor:
    """Maps `(images, grid_h, grid_w)` uniform in [0, 1); draws nothing from the global random state."""
    return torch.rand(tuple(shape), generator=torch.Generator().manual_seed(seed))


def faithfulness_per_image(
    model: nn.Module,
    images: Images,
    targets: Goal,
    heatmaps: Tensor,
    noise: Tensor,
    *,
    rollout: Tensor | None = None,
    steps: int = 5,
    baseline: Baseline = "mean",
    mean: Channels = None,
    std: Channels = None,
    output: Output | None = None,
) -> dict[str, Tensor]:
    """Insertion minus deletion and average drop of a map, beside a random map and plain rollout.

    Alone a number says little: an untrained model scores like random, and any map finds a centred object.

    Cost per image: `6 steps - 1` forwards (29 for 5 steps), and a forward and a backward more when the rollout
    is not handed in; "attention" two more, since the average drop is then taken against "mean".

    Args:
        model: As for `gmar`.
        images: `(batch, channels, height, width)`.
        targets: `(batch,)`, the classes explained, or a callable.
        heatmaps: `(batch, grid_h, grid_w)`, the map in question.
        noise: `(batch, grid_h, grid_w)`, the random map of each image, see `random_maps`.
        rollout: `(batch, grid_h, grid_w)`, plain attention rollout; None computes it.
        steps: As for `insertion`, and so `mean` and `std`.
        baseline: What removed cells show, the same for insertion and deletion.
        mean: Channel means.
        std: Channel standard deviations.
        output: What the class scores are, as for `gmar`.

    Returns:
        `(batch,)` each: "insertion_minus_deletion" and "average_drop" of the map in question, and each with
        "_random" and "_rollout" for the two beside it. NaN where the map is not finite.
    """
    check_steps(steps)
    if rollout is None:
        rollout = gmar(model, images, targets, norm="uniform", rollout="flow").heatmaps
    maps = {"": heatmaps, "_random": noise.to(heatmaps.device), "_rollout": rollout}
    values: dict[str, Tensor] = {}
    with perturbing(
        model, images, heatmaps, targets, baseline=baseline, mean=mean, std=std, output=output
    ) as probe:
        shown = Perturbation(model, images, heatmaps, targets, "mean", mean, std, output)
        for name, drawn in maps.items():
            area = probability_area(probe, drawn, steps, insert=True) - probability_area(
                probe, drawn, steps, insert=False
            )
            drop = relative_drop(shown if baseline == "attention" else probe, drawn)
            values[f"insertion_minus_deletion{name}"] = _where_finite(drawn, area)
            values[f"average_drop{name}"] = _where_finite(drawn, drop)
    return values


def check_steps(steps: int) -> None:
    """Refuse a number of parts, that cells are added or removed in, which is no positive integer."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a positive integer, got {steps!r}")


def probability_area(probe: Perturbation, heatmaps: Tensor, steps: int, *, insert: bool) -> Tensor:
    """Insertion or deletion of one of several maps of the same images; `probe` keeps what they share.

    Cost: `steps - 1` forwards per image, beside two that the maps share.
    """
    order = _hottest_first(heatmaps)
    cells = order.shape[1]
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(cells, device=order.device).expand_as(order)
    )
    counts = sorted({round(cells * step / steps) for step in range(steps + 1)})
    curve = [probe.empty if insert else probe.intact]
    curve += [probe.keeping(rank < n if insert else rank >= n) for n in counts[1:-1]]
    curve += [probe.intact if insert else probe.empty]
    fractions = torch.tensor(counts, device=curve[0].device) / cells
    return torch.trapezoid(torch.stack(curve), fractions, dim=0)


def salience_coefficient(probe: Perturbation, heatmaps: Tensor, groups: int) -> Tensor:
    """SaCo of one of several maps of the same images; `groups` forwards beside the shared one."""
    values = torch.nan_to_num(heatmaps.float()).flatten(1).to(probe.images.device)
    heats, falls = [], []
    for members in _hottest_first(heatmaps).to(values.device).tensor_split(groups, 1):
        keep = torch.ones_like(values, dtype=torch.bool).scatter(1, members, False)
        falls.append(probe.intact - probe.keeping(keep))
        heats.append(values.gather(1, members).mean(1))
    heat, fall = torch.stack(heats, 1), torch.stack(falls, 1)
    first, second = torch.triu_indices(groups, groups, 1, device=heat.device)
    gap = heat[:, first] - heat[:, second]
    signed = torch.where(fall[:, first] >= fall[:, second], gap, -gap)
    total = gap.abs().sum(1)
    return torch.where(total > 0, signed.sum(1) / total, 0.0)


def _hottest_first(heatmaps: Tensor) -> Tensor:
    """Cells by falling heat, `(batch, cells)`; equal ones in an order that is scattered over the picture."""
    heat = torch.nan_to_num(heatmaps.detach().float()).flatten(1)
    golden = (math.sqrt(5) - 1) / 2
    scattered = (torch.arange(heat.shape[1], dtype=torch.float64) * golden).frac().argsort().to(heat.device)
    return scattered[heat[:, scattered].argsort(dim=1, descending=True, stable=True)]


def relative_drop(probe: Perturbation, heatmaps: Tensor) -> Tensor:
    """Average drop of one of several maps of the same images; one forward beside the shared one."""
    fall = (probe.intact - probe.blending(_shown(heatmaps, probe))).clamp_min(0)
    return fall / probe.intact.abs().clamp_min(torch.finfo(torch.float32).tiny)  # a number has any sign


def _shown(heatmaps: Tensor, probe: Perturbation) -> Tensor:
    """The heatmap scaled to [0, 1] and enlarged to the image, `(batch, height, width)`."""
    heat = torch.nan_to_num(heatmaps.detach().float()).to(probe.images.device)
    low, high = heat.amin((1, 2), keepdim=True), heat.amax((1, 2), keepdim=True)
    scaled = torch.where(high > low, (heat - low) / (high - low), 0.0)
    return F.interpolate(scaled[:, None], probe.images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]


def _where_finite(heatmaps: Tensor, values: Tensor) -> Tensor:
    finite = heatmaps.isfinite().flatten(1).all(1).to(values.device)
    return values.where(finite, torch.nan)
