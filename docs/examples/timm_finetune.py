"""Fine-tune a timm model: the probe before the first step shows the pretrained model, drift is measured from it."""

import timm
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from gmar_lightning import GMARCallback


class FineTune(LightningModule):
    def __init__(self, name="vit_tiny_patch16_224", pretrained=False, **changes):
        super().__init__()
        # Mean and standard deviation for the pictures are taken from timm's `pretrained_cfg`.
        self.model = timm.create_model(name, pretrained=pretrained, num_classes=4, **changes)

    def forward(self, images):
        return self.model(images)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val/accuracy", (self(batch[0]).argmax(-1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-4, weight_decay=0.05)


data = DataLoader(TensorDataset(torch.randn(16, 3, 32, 32), torch.arange(16) % 4), batch_size=8)
watch = GMARCallback(every_n_epochs=1, num_images=8, target="label", class_names=["ant", "bee", "cat", "dog"])
trainer = Trainer(max_epochs=2, callbacks=[watch])
trainer.fit(FineTune(img_size=32, depth=2), data, data)
