"""Watch a ViT in a plain Lightning script: one line in `callbacks`."""

import timm
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from gmar_lightning import GMARCallback


class Classifier(LightningModule):
    def __init__(self):
        super().__init__()
        self.vit = timm.models.VisionTransformer(
            img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=4
        )

    def forward(self, images):
        return self.vit(images)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val/accuracy", (self(batch[0]).argmax(-1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)


data = DataLoader(TensorDataset(torch.randn(32, 3, 32, 32), torch.arange(32) % 4), batch_size=8)
trainer = Trainer(max_epochs=2, callbacks=[GMARCallback(every_n_train_steps=2, num_images=8)])
trainer.fit(Classifier(), data, data)
