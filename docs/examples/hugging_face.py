"""A Hugging Face ViT inside a LightningModule: `module` names it, and batches may be dictionaries."""

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader
from transformers import ViTConfig, ViTForImageClassification

from gmar_lightning import GMARCallback


class FineTune(LightningModule):
    def __init__(self):
        super().__init__()
        # ViTForImageClassification.from_pretrained("google/vit-base-patch16-224") in earnest
        self.vit = ViTForImageClassification(
            ViTConfig(
                hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48,
                image_size=32, patch_size=8, num_labels=4,
            )
        )  # fmt: skip

    def training_step(self, batch, batch_idx):
        return self.vit(**batch).loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.vit(**batch).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)


data = DataLoader(
    [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 4} for i in range(32)], batch_size=8
)
trainer = Trainer(max_epochs=1, callbacks=[GMARCallback(module="vit", every_n_train_steps=2)])
trainer.fit(FineTune(), data, data)
