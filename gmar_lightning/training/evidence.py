"""How much of each method's heatmap lies where the evidence is, while the model learns."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from gmar_lightning.explain.gmar import gmar
from gmar_lightning.explain.importance import Norm
from gmar_lightning.explain.localisation import energy_in_mask
from gmar_lightning.explain.rollout import Rollout

METHODS: dict[str, tuple[Norm, Rollout]] = {
    "gmar": ("l1", "paper"),
    "gmar_flow": ("l1", "flow"),
    "rollout": ("uniform", "flow"),
    "last_attention": ("uniform", "last_layer"),
    "gradient": ("uniform", "gradient"),
    "gradient_gmar": ("l1", "gradient"),
}


class EvidenceShare(Callback):
    """Log the share of each method's heatmap that lies in the masks of the validation set.

    For data whose batches are ``(images, labels, masks)``. After every validation, ``val/evidence_<method>``
    is the mean over the first images; a map that spreads evenly scores the mask's share of the image.

    Args:
        num_images: how many validation images are explained.

    Raises:
        ValueError: ``num_images`` is not positive.
    """

    def __init__(self, num_images: int = 64):
        if num_images < 1:
            raise ValueError(f"num_images must be at least 1, got {num_images}")
        self.num_images = num_images

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = getattr(trainer, "datamodule", None)
        if trainer.sanity_checking or data is None:
            return
        items = [data.val_set[index] for index in range(min(self.num_images, len(data.val_set)))]
        images, labels, masks = (
            torch.stack([torch.as_tensor(item[part]) for item in items]) for part in range(3)
        )
        for name, (norm, rollout) in METHODS.items():
            maps = gmar(pl_module, images, labels, norm=norm, rollout=rollout).heatmaps
            share = energy_in_mask(maps, masks.to(maps.device)).nanmean()
            pl_module.log(f"val/evidence_{name}", share, batch_size=len(images), sync_dist=True)
