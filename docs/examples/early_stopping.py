"""Stop as soon as a head is flagged: the numbers are in `trainer.callback_metrics`, as for any metric."""

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from timm.models import VisionTransformer
from torch.utils.data import DataLoader, TensorDataset

from gmar_lightning import GMARCallback


class Classifier(LightningModule):
    def __init__(self):
        super().__init__()
        self.vit = VisionTransformer(
            img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=4
        )

    def forward(self, images):
        return self.vit(images)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)


flags = EarlyStopping("gmar/collapsed_heads", mode="min", divergence_threshold=0.5, patience=1000)
best = ModelCheckpoint(monitor="gmar/effective_heads", mode="max")
data = DataLoader(TensorDataset(torch.randn(32, 3, 16, 16), torch.arange(32) % 4), batch_size=8)
watch = GMARCallback(every_n_train_steps=2, num_images=8)
Trainer(max_epochs=2, callbacks=[watch, flags, best]).fit(Classifier(), data, data)
