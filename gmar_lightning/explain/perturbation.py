"""Parts of an image taken away: as pixels, or as tokens that nobody attends to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmar_lightning.explain.errors import UnsupportedModelError
from gmar_lightning.explain.explained import number_of
from gmar_lightning.explain.inputs import Goal, checked_targets, forward, image_key, logits_of, model_inputs
from gmar_lightning.explain.intercept import CallArguments, intercept_attention
from gmar_lightning.explain.isolation import undisturbed
from gmar_lightning.explain.output import Output, classes_of, kind_of, probabilities

Baseline = Literal["black", "mean", "blur", "attention"]
PIXEL_BASELINES = ("black", "mean", "blur")

# Class, distillation and register tokens together; more is some other arrangement than tokens plus patches.
_MOST_PREFIX_TOKENS = 64


def check_baseline(
    baseline: str,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    allowed: Sequence[str] = get_args(Baseline),
) -> None:
    """Check what takes the place of removed parts.

    Raises:
        ValueError: With the allowed values.
    """
    if baseline not in allowed:
        raise ValueError(f"baseline={baseline!r} is unknown; choose one of {', '.join(map(repr, allowed))}")
    if (mean is None) != (std is None):
        raise ValueError("mean and std belong together: give both or neither")


@contextmanager
def perturbing(
    model: nn.Module,
    images: Tensor | Mapping[str, Any],
    heatmaps: Tensor,
    targets: Goal,
    *,
    baseline: Baseline,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    output: Output | None = None,
) -> Iterator[Perturbation]:
    """Run `model` on images with parts removed; inside the block nothing of it changes.

    Args:
        model: As for `gmar`.
        images: `(batch, channels, height, width)`, or a mapping with such an entry.
        heatmaps: `(batch, grid_h, grid_w)`: its grid is the grid of removable cells.
        targets: `(batch,)` class indices; or a callable `(output) -> (batch,)`, whose number is then measured in the
            place of a probability.
        baseline: What takes the place of a removed cell.
        mean: Channel means that the images were normalised with; only "black" needs them.
        std: Channel standard deviations, likewise.
        output: As for `gmar`; softmax where nothing is known.

    Raises:
        ValueError: For arguments that do not fit.
    """
    check_baseline(baseline, mean, std)
    with undisturbed(model), torch.no_grad():
        probe = Perturbation(model, images, heatmaps, targets, baseline, mean, std, output)
        if baseline == "attention":
            probe.check_hidden()
        yield probe


class Perturbation:
    """Probability of the explained class as parts of the images are removed; one forward per answer.

    Where a callable says what is explained, its number stands wherever "probability" is written.
    Made by `perturbing`, and valid inside its block.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor | Mapping[str, Any],
        heatmaps: Tensor,
        targets: Goal,
        baseline: Baseline,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        output: Output | None = None,
    ) -> None:
        self._model, self._baseline = model, baseline
        self._output: Output | None = output
        self._inputs = model_inputs(model, images)
        key = image_key(self._inputs)
        if key is None or not self._inputs[key].is_floating_point():
            raise ValueError("images must be a float tensor (batch, channels, height, width)")
        self._key = key
        batch = len(self.images)
        if heatmaps.ndim != 3 or len(heatmaps) != batch:
            raise ValueError(f"heatmaps must be ({batch}, grid_h, grid_w), got {tuple(heatmaps.shape)}")
        goal = checked_targets(targets, batch)
        if goal is None:
            raise ValueError("targets are needed: class indices, one per image, or a callable on the output")
        self.targets = goal.to(self.images.device) if isinstance(goal, Tensor) else goal
        self.grid: tuple[int, int] = (heatmaps.shape[1], heatmaps.shape[2])
        self._mean, self._std = mean, std

    @property
    def _nothing(self) -> Tensor:
        return torch.zeros(
            len(self.images), math.prod(self.grid), dtype=torch.bool, device=self.images.device
        )

    @property
    def images(self) -> Tensor:
        """The images, `(batch, channels, height, width)`, on the model's device."""
        return self._inputs[self._key]

    @cached_property
    def intact(self) -> Tensor:
        """Probability on the untouched images, `(batch,)`."""
        return self._probability(self._run(self.images))

    @cached_property
    def empty(self) -> Tensor:
        """Probability when every cell is removed, `(batch,)`."""
        return self.keeping(self._nothing)

    def check_hidden(self) -> None:
        """Refuse a model that goes on reading patch tokens which nobody attends to any more.

        Raises:
            UnsupportedModelError: When the logits still depend on the image with every patch hidden.
        """
        output = self._run_masked(self.images, self._nothing)
        seen = [self._compared(each) for each in (output, self._run_masked(1 - self.images, self._nothing))]
        # Far above the rounding of kernels with and without a mask, far below what reading pixels does.
        if (seen[0] - seen[1]).abs().max() > 1e-3 * seen[0].abs().max():
            raise UnsupportedModelError(
                "with every patch hidden from attention the logits still depend on the image: the classifier reads "
                "the patch tokens themselves (mean pooling), or part of its attention is not computed by "
                "scaled_dot_product_attention. Take baseline='black', 'mean' or 'blur'."
            )
        self.empty = self._probability(output)

    def keeping(self, keep: Tensor) -> Tensor:
        """Probability when only some cells are left, `(batch,)`.

        Args:
            keep: `(batch, cells)`, True where a cell of the grid stays.
        """
        keep = keep.to(self.images.device)
        if self._baseline == "attention":
            return self._probability(self._run_masked(self.images, keep))
        share = keep.unflatten(1, self.grid)[:, None].float()
        return self.blending(F.interpolate(share, self.images.shape[-2:], mode="nearest")[:, 0])

    def blending(self, share: Tensor) -> Tensor:
        """Probability when each pixel is a mixture of image and baseline, `(batch,)`.

        Args:
            share: `(batch, height, width)`, share of the image in [0, 1].
        """
        share = share[:, None].to(self.images)
        return self._probability(self._run(torch.lerp(self._removed, self.images, share)))

    @cached_property
    def _removed(self) -> Tensor:
        images = self.images
        if self._baseline == "mean":
            return images.mean((-2, -1), keepdim=True).expand_as(images)
        if self._baseline == "blur":
            return _blurred(images, self.grid)
        black = torch.zeros(images.shape[1], 1, 1)
        if self._mean is not None and self._std is not None:
            black = -torch.tensor(self._mean)[:, None, None] / torch.tensor(self._std)[:, None, None]
        return black.to(images).expand_as(images)

    def _run(self, images: Tensor) -> Any:
        return forward(self._model, {**self._inputs, self._key: images})

    def _probability(self, output: Any) -> Tensor:
        if not isinstance(self.targets, Tensor):
            return number_of(self.targets, output, len(self.images)).float()
        logits = logits_of(output)
        if not 0 <= int(self.targets.min()) <= int(self.targets.max()) < classes_of(logits):
            raise ValueError(f"targets must name one of the model's {classes_of(logits)} classes")
        # Settled by the first answer: what a model returns is the same for every image.
        self._output = kind_of(logits, self._output) or "logits"
        chances = probabilities(logits.float(), self._output)
        assert chances is not None
        return chances.gather(1, self.targets[:, None])[:, 0]

    def _compared(self, output: Any) -> Tensor:
        return logits_of(output) if isinstance(self.targets, Tensor) else self._probability(output)

    def _run_masked(self, images: Tensor, keep: Tensor) -> Any:
        with intercept_attention(self._model, lambda call: _without_keys(call, keep)):
            return self._run(images)


def _without_keys(call: CallArguments, keep: Tensor) -> Tensor:
    """An attention call in which some patch tokens are no keys; a query left without any key gets zeros."""
    prefix = call.k.shape[-2] - keep.shape[1]
    if len(call.q) != len(keep) or not 0 <= prefix <= _MOST_PREFIX_TOKENS:
        raise UnsupportedModelError(
            f"{call.name} ({call.owner}) attends to keys of shape {tuple(call.k.shape)} for {len(keep)} "
            f"images with {keep.shape[1]} cells: the heatmap's grid is not the patch grid, or attention is windowed "
            "or pooled. Take a pixel baseline."
        )
    allowed = F.pad(keep, (prefix, 0), value=True)[:, None, None]
    if call.causal:
        square = torch.ones(call.q.shape[-2], call.k.shape[-2], dtype=torch.bool, device=keep.device)
        allowed = allowed & square.tril()
    given = call.mask
    if given is None:
        mask = allowed
    elif given.dtype == torch.bool:
        mask = allowed = given & allowed
    else:
        mask = torch.where(allowed, given, -math.inf)
    return torch.where(allowed.any(-1, keepdim=True), call.compute(mask), 0)


def _blurred(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Gaussian blur whose standard deviation is the side of a cell: what a cell shows is gone."""
    channels = images.shape[1]
    blurred = images.float()
    for axis in (0, 1):
        side = images.shape[2 + axis] / grid[axis]
        reach = math.ceil(3 * side)
        kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=images.device) / side) ** 2)
        kernel = (kernel / kernel.sum()).expand(channels, 1, -1)
        pad = (reach, reach, 0, 0) if axis else (0, 0, reach, reach)
        kernel = kernel[:, :, None] if axis else kernel[..., None]
        blurred = F.conv2d(F.pad(blurred, pad, mode="replicate"), kernel, groups=channels)
    return blurred.to(images.dtype)
