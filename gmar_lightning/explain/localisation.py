"""How much of a heatmap lies where the object is; the masks say where."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pointing_game(heatmaps: Tensor, masks: Tensor) -> Tensor:
    """Whether the hottest cell's centre lies on the object (Zhang et al. 2016, without their margin).

    Cost: none, no forward. A heatmap with several hottest cells counts with the share of them that hit.

    Args:
        heatmaps: `(batch, grid_h, grid_w)`.
        masks: `(batch, height, width)`, non-zero on the object; any resolution.

    Returns:
        `(batch,)` in [0, 1]; NaN where the mask is empty.

    Raises:
        ValueError: When the shapes do not fit.
    """
    inside = _checked_masks(heatmaps, masks)
    rows, columns = (
        ((torch.arange(cells, device=inside.device) + 0.5) * size / cells).long()
        for cells, size in zip(heatmaps.shape[1:], masks.shape[1:], strict=True)
    )
    hit = inside[:, rows][:, :, columns]
    hottest = (heatmaps == heatmaps.amax((1, 2), keepdim=True)).float()
    share = (hottest * hit).sum((1, 2)) / hottest.sum((1, 2))
    return _where_known(share, heatmaps, inside)


def energy_in_mask(heatmaps: Tensor, masks: Tensor) -> Tensor:
    """Share of the heat that lies on the object (the energy-based pointing game of Score-CAM, 2020).

    `sum(heat * covered) / sum(heat)`, with `covered` the part of each cell that the mask covers. A uniform map
    scores the object's share of the picture: compare with that. Cost: none, no forward.

    Args:
        heatmaps: `(batch, grid_h, grid_w)`, non-negative.
        masks: `(batch, height, width)`, non-zero on the object; any resolution.

    Returns:
        `(batch,)` in [0, 1]; NaN where the mask is empty or the heatmap is zero.

    Raises:
        ValueError: When the shapes do not fit or a heatmap is negative somewhere.
    """
    inside = _checked_masks(heatmaps, masks)
    if (heatmaps < 0).any():
        raise ValueError("heatmaps must be non-negative: a share of negative heat means nothing")
    heat = heatmaps.float()
    covered = F.adaptive_avg_pool2d(inside[:, None], (heat.shape[1], heat.shape[2]))[:, 0]
    share = (heat * covered).sum((1, 2)) / heat.sum((1, 2))
    return _where_known(share, heatmaps, inside)


def _checked_masks(heatmaps: Tensor, masks: Tensor) -> Tensor:
    if heatmaps.ndim != 3 or masks.ndim != 3 or len(heatmaps) != len(masks):
        raise ValueError(
            "heatmaps must be (batch, grid_h, grid_w) and masks (batch, height, width) with as many images; "
            f"got {tuple(heatmaps.shape)} and {tuple(masks.shape)}"
        )
    return (masks != 0).float().to(heatmaps.device)


def _where_known(share: Tensor, heatmaps: Tensor, inside: Tensor) -> Tensor:
    known = heatmaps.isfinite().flatten(1).all(1) & inside.flatten(1).any(1)
    return share.where(known, torch.nan)
