"""How much of each kind of heatmap lies on the evidence, where the data set knows where that is."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from gmar_lightning.explain.gmar import gmar
from gmar_lightning.explain.localisation import energy_in_mask
from gmar_lightning.explain.rollout import Rollout

# Under which name the share of each form is logged; "gmar" is the form shown by default.
FORMS: dict[str, Rollout] = {
    "gmar": "gradient",
    "paper": "paper",
    "rollout": "rollout",
    "last_layer": "last_layer",
}


class EvidenceShare(Callback):
    """Log after every validation how much of the heat lies in the mask of the evidence.

    For data sets whose third batch element is a mask, such as `Cells` and `WatermarkedDigits`. Logs
    `val/evidence_gmar`, `val/evidence_paper`, `val/evidence_rollout` and
    `val/evidence_last_layer`: means over the images of `energy_in_mask`, for the map of the labelled
    class. A uniform map scores the mask's share of the picture, which is 0.25 for `Cells`.
    Costs about three forwards of `num_images` images.

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
        maps = gmar(pl_module, images, labels, rollout=list(FORMS.values())).maps
        for name, form in FORMS.items():
            share = energy_in_mask(maps[form], masks.to(maps[form].device)).nanmean()
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
