"""A W&B sweep for the best accuracy among runs in which no head collapsed. Online: `python sweep.py --agent`."""

import sys

import timm
import torch
import wandb
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from torch.utils.data import DataLoader, TensorDataset

from gmar_lightning import GMARCallback

SWEEP = {
    "method": "grid",
    "metric": {"name": "objective", "goal": "maximize"},  # or gmar/collapsed_heads, minimize
    "parameters": {"lr": {"values": [1e-3, 1e-2]}},
}


class Classifier(LightningModule):
    def __init__(self, lr):
        super().__init__()
        self.lr = lr
        self.vit = timm.models.VisionTransformer(
            img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=4
        )

    def forward(self, images):
        return self.vit(images)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        accuracy = (self(batch[0]).argmax(-1) == batch[1]).float().mean()
        flagged = self.trainer.callback_metrics.get("gmar/collapsed_heads", torch.tensor(0.0))
        self.log_dict({"val/accuracy": accuracy, "objective": accuracy * (flagged == 0)})

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), self.lr)


def train(lr=None):
    with wandb.init(project="sweep", config={} if lr is None else {"lr": lr}) as run:
        data = DataLoader(TensorDataset(torch.randn(32, 3, 16, 16), torch.arange(32) % 4), batch_size=8)
        watch = GMARCallback(every_n_train_steps=2, num_images=8, save_dir=f"runs/{run.id}")
        trainer = Trainer(max_epochs=1, logger=WandbLogger(experiment=run), callbacks=[watch])
        trainer.fit(Classifier(run.config["lr"]), data, data)


if "--agent" in sys.argv:
    wandb.agent(wandb.sweep(SWEEP, project="sweep"), train)
else:
    for rate in SWEEP["parameters"]["lr"]["values"]:
        train(rate)
