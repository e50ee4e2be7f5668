"""React to a collapse in your own way: here, halve the learning rate, once per alarm."""

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from timm.models import VisionTransformer
from torch.utils.data import DataLoader, TensorDataset

from gmar_lightning import GMARCallback


class Classifier(BoringModel):
    def __init__(self):
        super().__init__()
        self.layer = VisionTransformer(
            img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=4
        )

    def validation_step(self, batch, batch_idx):
        return None

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])


def halve_the_rate(trainer, module, events):
    """Called on every process, with the `HeadEvent`s that raised the alarm."""
    for event in events:
        print(f"step {event.step}: {event.message}")
    for group in trainer.optimizers[0].param_groups:
        group["lr"] /= 2


data = DataLoader(TensorDataset(torch.randn(32, 3, 16, 16), torch.arange(32) % 4), batch_size=8)
watch = GMARCallback(every_n_train_steps=2, num_images=8, on_collapse=halve_the_rate)
Trainer(max_epochs=2, callbacks=[watch]).fit(Classifier(), data, data)
