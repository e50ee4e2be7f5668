"""Faithfulness of heatmaps and importance of heads as torchmetrics: accumulated over batches and processes.

The formulas, their sources and their pitfalls are documented on the functions of
`gmar_lightning.explain.faithfulness`, which these classes average over images. A metric never changes its
model: it runs it in evaluation mode inside `undisturbed`, and moving, casting or copying the metric leaves the
model where and as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import rank_zero_warn

from gmar_lightning.explain import faithfulness
from gmar_lightning.explain.importance import head_shares
from gmar_lightning.explain.inputs import Goal
from gmar_lightning.explain.localisation import energy_in_mask, pointing_game
from gmar_lightning.explain.perturbation import PIXEL_BASELINES, Baseline, check_baseline

__all__ = [
    "AverageDrop",
    "AverageIncrease",
    "DeletionAUC",
    "EnergyInMask",
    "HeadImportance",
    "InsertionAUC",
    "PointingGame",
    "SaCo",
]


class _Borrowed:
    """Holds a model without registering it as a submodule; copies of the holder point at the same model."""

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self.model = model

    def __deepcopy__(self, memo: dict[int, Any]) -> _Borrowed:
        return self


class _MeanOverImages(Metric):
    """Mean of one value per image; images without a value (not finite, no object) are left out and counted."""

    is_differentiable = False
    full_state_update = False
    total: Tensor
    count: Tensor
    skipped: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("skipped", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def _add(self, values: Tensor) -> None:
        values = values.to(self.total.device)
        known = values.isfinite()
        self.total += values[known].sum()
        self.count += known.sum()
        self.skipped += (~known).sum()

    def compute(self) -> Tensor:
        """Mean over all images so far, a scalar; NaN when there was none."""
        if self.skipped:
            rank_zero_warn(
                f"{type(self).__name__} left out {int(self.skipped)} of {int(self.skipped + self.count)} images: "
                "their heatmap is not finite, or there is no object in their mask"
            )
        return self.total / self.count


class _OfModel(_MeanOverImages):
    def __init__(self, model: nn.Module, measure: Callable[..., Tensor], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._borrowed = _Borrowed(model)
        self._measure = measure

    def update(self, images: Tensor, heatmaps: Tensor, targets: Goal) -> None:
        """Add a batch.

        Args:
            images: `(batch, channels, height, width)`, as the model reads them.
            heatmaps: `(batch, grid_h, grid_w)`.
            targets: `(batch,)`, the classes explained; or a callable, whose number stands for the probability.
        """
        self._add(self._measure(self._borrowed.model, images, heatmaps, targets))


class InsertionAUC(_OfModel):
    """Mean area under the probability as cells of the image appear, hottest first; higher is better.

    See `gmar_lightning.explain.faithfulness.insertion` (Petsiuk et al. 2018). Cost: `steps + 1` forwards per
    image.

    Args:
        model: Takes images `(batch, channels, height, width)` and returns logits `(batch, classes)`.
        steps: Parts that the cells are added in.
        baseline: What a cell shows before it appears: "black", "mean", "blur", or "attention" (the token is
            hidden from all others).
        mean: Channel means that the images were normalised with; only "black" needs them.
        std: Channel standard deviations, likewise.
        kwargs: Arguments of `torchmetrics.Metric`, such as `sync_on_compute` and `dist_sync_on_step`.

    Raises:
        ValueError: For arguments outside their range.
    """

    higher_is_better = True

    def __init__(
        self,
        model: nn.Module,
        *,
        steps: int = 10,
        baseline: Baseline = "blur",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        faithfulness.check_steps(steps)
        check_baseline(baseline, mean, std)
        measure = partial(faithfulness.insertion, steps=steps, baseline=baseline, mean=mean, std=std)
        super().__init__(model, measure, **kwargs)


class DeletionAUC(_OfModel):
    """Mean area under the probability as cells of the image vanish, hottest first; lower is better.

    See `gmar_lightning.explain.faithfulness.deletion` (Petsiuk et al. 2018). Cost: `steps + 1` forwards per
    image. Arguments as for `InsertionAUC`.

    Raises:
        ValueError: For arguments outside their range.
    """

    higher_is_better = False

    def __init__(
        self,
        model: nn.Module,
        *,
        steps: int = 10,
        baseline: Baseline = "mean",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        faithfulness.check_steps(steps)
        check_baseline(baseline, mean, std)
        measure = partial(faithfulness.deletion, steps=steps, baseline=baseline, mean=mean, std=std)
        super().__init__(model, measure, **kwargs)


class AverageDrop(_OfModel):
    """Mean relative loss of probability when only what the heatmap marks is shown; lower is better.

    See `gmar_lightning.explain.faithfulness.average_drop` (Grad-CAM++, 2018). A fraction in [0, 1], not
    percent. Cost: 2 forwards per image.

    Args:
        model: Takes images `(batch, channels, height, width)` and returns logits `(batch, classes)`.
        baseline: What the rest of the image shows: "black", "mean" or "blur".
        mean: Channel means that the images were normalised with; only "black" needs them.
        std: Channel standard deviations, likewise.
        kwargs: Arguments of `torchmetrics.Metric`, such as `sync_on_compute` and `dist_sync_on_step`.

    Raises:
        ValueError: For arguments outside their range.
    """

    higher_is_better = False

    def __init__(
        self,
        model: nn.Module,
        *,
        baseline: Baseline = "black",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        check_baseline(baseline, mean, std, allowed=PIXEL_BASELINES)
        super().__init__(
            model, partial(faithfulness.average_drop, baseline=baseline, mean=mean, std=std), **kwargs
        )


class AverageIncrease(_OfModel):
    """Share of images whose probability rises when only what the heatmap marks is shown; higher is better.

    See `gmar_lightning.explain.faithfulness.average_increase` (Grad-CAM++, 2018). Cost: 2 forwards per image.
    Arguments as for `AverageDrop`.

    Raises:
        ValueError: For arguments outside their range.
    """

    higher_is_better = True

    def __init__(
        self,
        model: nn.Module,
        *,
        baseline: Baseline = "black",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        check_baseline(baseline, mean, std, allowed=PIXEL_BASELINES)
        super().__init__(
            model, partial(faithfulness.average_increase, baseline=baseline, mean=mean, std=std), **kwargs
        )


class SaCo(_OfModel):
    """Mean salience-guided faithfulness coefficient, in [-1, 1]; higher is better.

    See `gmar_lightning.explain.faithfulness.saco` (arXiv 2404.01415). Cost: `groups + 1` forwards per image.

    Args:
        model: Takes images `(batch, channels, height, width)` and returns logits `(batch, classes)`.
        groups: Groups of equal size that the cells are sorted into.
        baseline: What a removed cell shows: "black", "mean", "blur" or "attention".
        mean: Channel means that the images were normalised with; only "black" needs them.
        std: Channel standard deviations, likewise.
        kwargs: Arguments of `torchmetrics.Metric`, such as `sync_on_compute` and `dist_sync_on_step`.

    Raises:
        ValueError: For arguments outside their range.
    """

    higher_is_better = True

    def __init__(
        self,
        model: nn.Module,
        *,
        groups: int = 10,
        baseline: Baseline = "mean",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        if groups < 2:
            raise ValueError(f"groups must be at least 2, got {groups}")
        check_baseline(baseline, mean, std)
        measure = partial(faithfulness.saco, groups=groups, baseline=baseline, mean=mean, std=std)
        super().__init__(model, measure, **kwargs)


class PointingGame(_MeanOverImages):
    """Share of images whose hottest cell lies on the object; higher is better.

    See `gmar_lightning.explain.localisation.pointing_game` (Zhang et al. 2016). No forward.
    """

    higher_is_better = True

    def update(self, heatmaps: Tensor, masks: Tensor) -> None:
        """Add a batch: heatmaps `(batch, grid_h, grid_w)`, masks `(batch, height, width)`."""
        self._add(pointing_game(heatmaps, masks))


class EnergyInMask(_MeanOverImages):
    """Mean share of the heat that lies on the object; higher is better.

    See `gmar_lightning.explain.localisation.energy_in_mask` (Score-CAM, 2020). No forward.
    """

    higher_is_better = True

    def update(self, heatmaps: Tensor, masks: Tensor) -> None:
        """Add a batch: heatmaps `(batch, grid_h, grid_w)`, masks `(batch, height, width)`."""
        self._add(energy_in_mask(heatmaps, masks))


class HeadImportance(Metric):
    """Mean, spread and share of every head's importance over any number of images, in constant memory.

    Means and squared deviations are merged as in Chan, Golub & LeVeque (1983), so that neither the order nor
    the split into batches and processes matters, and float32 suffices. NaN entries (layers with fewer heads,
    images that could not be explained) are left out head by head. No forward.

    Args:
        layers: Number of attention layers.
        heads: Number of heads of the widest layer.
        kwargs: Arguments of `torchmetrics.Metric`.

    Raises:
        ValueError: When either is below 1.
    """

    is_differentiable = False
    full_state_update = False
    moments: Tensor

    def __init__(self, layers: int, heads: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if layers < 1 or heads < 1:
            raise ValueError(f"layers and heads must be at least 1, got {layers} and {heads}")
        self.add_state("moments", torch.zeros(3, layers, heads), dist_reduce_fx=_merged)

    def update(self, importance: Tensor) -> None:
        """Add a batch of raw importance, `(batch, layers, heads)` as in `GMARResult.importance`.

        Raises:
            ValueError: When the shape does not fit.
        """
        expected = tuple(self.moments.shape[1:])
        if importance.ndim != 3 or tuple(importance.shape[1:]) != expected:
            raise ValueError(
                f"importance must be (batch, layers, heads) with {expected[0]} layers and {expected[1]} heads, "
                f"got {tuple(importance.shape)}"
            )
        values = importance.detach().to(self.moments)
        known = values.isfinite()
        each = torch.stack([known.to(values.dtype), values.where(known, 0), torch.zeros_like(values)], 1)
        self.moments = _merged(torch.cat([self.moments[None], each]))

    def compute(self) -> dict[str, Tensor]:
        """Statistics of every head over all images so far, `(layers, heads)` each; NaN without images.

        Returns:
            "mean" and "std" (with Bessel's correction) of the raw importance, and "share": the mean as a share
            of its layer, 0 everywhere in a layer without gradient.
        """
        count, mean, squares = self.moments
        mean = mean.where(count > 0, torch.nan)
        std = (squares / (count - 1)).where(count > 1, torch.nan).sqrt()
        return {"mean": mean, "std": std, "share": head_shares(mean)}


def _merged(moments: Tensor) -> Tensor:
    """Merge counts, means and squared deviations of disjoint sets of images, `(sets, 3, layers, heads)`."""
    counts, means, squares = moments.unbind(1)
    total = counts.sum(0)
    mean = (counts * means).sum(0) / total.clamp_min(1)
    spread = squares.sum(0) + (counts * (means - mean).square()).sum(0)
    return torch.stack([total, mean, spread])
