"""How much of each kind of heatmap lies on the evidence, where the data set knows where that is."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from gmar_lightning.explain.gmar import gmar
from gmar_lightning.explain.localisation import energy_in_mask

# The arguments of gmar() that make each picture.
METHODS: dict[str, dict[str, Any]] = {
    "gmar": {},
    "rollout": {"norm": "uniform"},
    "gradient": {"rollout": "gradient"},
    "last_layer": {"rollout": "last_layer"},
}


class EvidenceShare(Callback):
    """Log after every validation how much of the heat lies in the mask of the evidence.

    For data sets whose third batch element is a mask, such as `Cells` and `WatermarkedDigits`. Logs
    `val/evidence_gmar`, `val/evidence_rollout`, `val/evidence_gradient` and
    `val/evidence_last_layer`: means over the images of `energy_in_mask`, for the map of the labelled
    class. A uniform map scores the mask's share of the picture, which is 0.25 for `Cells`.
    Costs about twelve forwards of `num_images` images.

    Args:
        num_images: the first so-many validation images are explained.

    Raises:
        ValueError: `num_images` is not positive, or, before training starts, the data has no masks.
    """

    def __init__(self, num_images: int = 64):
        if num_images < 1:
            raise ValueError(f"num_images must be at least 1, got {num_images}")
        self.num_images = num_images

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        images, labels, masks = self._examples(trainer)
        if trainer.sanity_checking:
            return
        images, labels = images.to(pl_module.device), labels.to(pl_module.device)
        for name, form in METHODS.items():
            heatmaps = gmar(pl_module, images, labels, **form).heatmaps
            share = energy_in_mask(heatmaps, masks.to(heatmaps.device)).nanmean()
            pl_module.log(f"val/evidence_{name}", share, sync_dist=True)

    def _examples(self, trainer: Trainer) -> tuple[Tensor, Tensor, Tensor]:
        # Every process explains the same images, so that no process waits for another.
        dataset: Any = trainer.val_dataloaders.dataset if trainer.val_dataloaders else []
        items = [dataset[index] for index in range(min(self.num_images, len(dataset)))]
        if not items or len(items[0]) < 3:
            raise ValueError("EvidenceShare needs validation data of (image, label, mask), as Cells gives")
        images, labels, masks = (
            torch.stack([torch.as_tensor(item[at]) for item in items]) for at in range(3)
        )
        return images, labels, masks
