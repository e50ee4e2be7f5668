"""The classifier that `train.py` trains: any timm Vision Transformer."""

from typing import Any, cast

import timm
import torch
from lightning.pytorch import LightningModule
from timm.data.mixup import Mixup
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics.classification import MulticlassAccuracy

from gmar_lightning.training.data import ImageData
from gmar_lightning.training.optim import parameter_groups, warmup_cosine
from gmar_lightning.training.weights import create_pretrained, load_weights


class Classifier(LightningModule):
    """A timm Vision Transformer with cross entropy, AdamW, warm-up and cosine schedule.

    Logs `train/loss`, `train/lr`, `val/loss` and `val/accuracy`. A checkpoint of it holds
    everything needed to use it again: `Classifier.load_from_checkpoint(path)` builds the network without
    fetching pretrained weights, and knows `class_names`, `image_size`, `mean` and `std`.

    Args:
        model_name: name of the model in timm.
        num_classes: size of the new head.
        image_size: side of the images in pixels; position embeddings are resized for it. None keeps the
            model's own.
        class_names: one name per class; None takes those of the data module.
        mean: channel means of the images; None takes the data module's, or else the model's own.
        std: channel standard deviations, as `mean`.
        model_args: more arguments for `timm.create_model`, for instance `{"depth": 6}`.
        pretrained: fetch timm's pretrained weights.
        weights: start from this file instead (.safetensors, .pth, .ckpt).
        position_std: spread of new position embeddings in place of timm's 0.02; with 0.5 a small model
            trained from scratch tells its patches apart from the first step. Not for pretrained weights.
        drop_path: rate of stochastic depth.
        lr: peak learning rate of the head.
        layer_decay: learning-rate factor per layer, from the head downwards, for instance 0.75.
        weight_decay: decay of the weights; biases and norms are exempt.
        weight_decay_of: another decay for weights whose name contains the key.
        warmup: share of the run that the learning rate takes to reach its peak.
        label_smoothing: share of the target spread over all classes.
        mixup: alpha of mixup; 0 switches it off.
        cutmix: alpha of cutmix; 0 switches it off. With both, each batch gets one of them.

    Raises:
        ValueError: an argument is out of range, both `pretrained` and `weights` are given, or the file
            does not fit the model.
        RuntimeError: timm knows no such model, or pretrained weights cannot be fetched.
    """

    def __init__(
        self,
        model_name: str = "vit_tiny_patch16_224",
        num_classes: int = 10,
        image_size: int | None = None,
        class_names: list[str] | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        model_args: dict[str, Any] | None = None,
        pretrained: bool = False,
        weights: str | None = None,
        position_std: float | None = None,
        drop_path: float = 0.0,
        lr: float = 1e-3,
        layer_decay: float = 1.0,
        weight_decay: float = 0.05,
        weight_decay_of: dict[str, float] | None = None,
        warmup: float = 0.1,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
    ):
        super().__init__()
        if pretrained and weights:
            raise ValueError("pretrained and weights are two sources for the same thing: give one")
        if position_std is not None and (pretrained or weights):
            raise ValueError("position_std is for training from scratch: pretrained weights bring positions")
        self.save_hyperparameters()
        arguments = {"num_classes": num_classes, "drop_path_rate": drop_path, **(model_args or {})}
        if image_size is not None:
            arguments["img_size"] = image_size
        if pretrained:
            self.model = create_pretrained(model_name, arguments)
        else:
            self.model = timm.create_model(model_name, **arguments)
        if position_std is not None:
            nn.init.trunc_normal_(cast(Tensor, self.model.pos_embed), std=position_std, a=-10, b=10)
        if weights:
            load_weights(self.model, weights)
        own = cast(dict[str, Any], self.model.pretrained_cfg)
        self.image_size = image_size or own["input_size"][-1]
        self.class_names = class_names
        self.mean = mean or list(own["mean"])
        self.std = std or list(own["std"])
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.mix = (
            Mixup(mixup, cutmix, label_smoothing=label_smoothing, num_classes=num_classes)
            if mixup > 0 or cutmix > 0
            else None
        )

    def setup(self, stage: str) -> None:
        """Take names and normalisation over from the data, so that a checkpoint knows them."""
        data = getattr(self.trainer, "datamodule", None)
        self.class_names = self.class_names or getattr(data, "class_names", None)
        if self.hparams["mean"] is None and isinstance(data, ImageData) and data.mean and data.std:
            self.mean, self.std = data.mean, data.std
        self.hparams.update(
            class_names=self.class_names, mean=self.mean, std=self.std, image_size=self.image_size
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return logits `(batch, classes)` for images `(batch, 3, height, width)`."""
        return self.model(images)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        """Return the loss of one batch `(images, labels, ...)`."""
        images, labels = batch[:2]
        if self.mix is not None:
            images, targets = self.mix(images, labels)
            loss = functional.cross_entropy(self(images), targets)
        else:
            loss = functional.cross_entropy(
                self(images), labels, label_smoothing=self.hparams["label_smoothing"]
            )
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the head's learning rate; with layer decay the other rates are fixed fractions of it."""
        self.log("train/lr", max(group["lr"] for group in optimizer.param_groups))

    def validation_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        """Log loss and accuracy over the validation set; batches are `(images, labels, ...)`."""
        images, labels = batch[:2]
        logits = self(images)
        self.accuracy(logits, labels)
        self.log("val/loss", functional.cross_entropy(logits, labels), prog_bar=True, sync_dist=True)
        self.log("val/accuracy", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW with the parameter groups of `optim.parameter_groups`; the schedule moves every step."""
        groups = parameter_groups(
            self.model,
            self.hparams["lr"],
            self.hparams["weight_decay"],
            self.hparams["layer_decay"],
            self.hparams["weight_decay_of"],
        )
        optimizer = torch.optim.AdamW(groups)
        factor = warmup_cosine(self.trainer.estimated_stepping_batches, self.hparams["warmup"])
        schedule = LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out where the weights came from: a checkpoint brings its own."""
        checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY].update(pretrained=False, weights=None)
