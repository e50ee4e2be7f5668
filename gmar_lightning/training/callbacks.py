"""Interventions in a training run: a frozen backbone, a learning rate gone wrong."""

from collections.abc import Callable
from typing import cast

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

from gmar_lightning.training.model import Classifier


class FreezeBackbone(Callback):
    """Train the head alone, for the first epochs or for the whole run (a linear probe).

    While frozen, the backbone is in eval mode (no dropout, no stochastic depth). Its parameters are in the
    optimizer from the start, with their own learning rates, and take part once they get gradients. With
    several processes, use `strategy: ddp_find_unused_parameters_true`.

    Args:
        until_epoch: the epoch (counted from 0) in which the backbone starts to learn; None: never.

    Raises:
        ValueError: `until_epoch` is not positive.
    """

    def __init__(self, until_epoch: int | None = None):
        if until_epoch is not None and until_epoch < 1:
            raise ValueError(f"until_epoch must be at least 1, or None for the whole run, got {until_epoch}")
        self.until_epoch = until_epoch

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        frozen = self.until_epoch is None or trainer.current_epoch < self.until_epoch
        model = cast(Classifier, pl_module).model
        head = cast(Callable[[], nn.Module], model.get_classifier)()
        model.requires_grad_(not frozen)
        model.train(not frozen)
        head.requires_grad_(True)
        head.train()


class ScaleLearningRate(Callback):
    """Multiply the learning rate of every parameter group from one epoch on, to see a run go wrong.

    Args:
        epoch: the epoch (counted from 0) in which the new rate starts.
        factor: what the rates are multiplied with.

    Raises:
        ValueError: `epoch` is negative or `factor` not positive.
    """

    def __init__(self, epoch: int, factor: float):
        if epoch < 0 or factor <= 0:
            raise ValueError(f"epoch must be at least 0 and factor positive, got {epoch} and {factor}")
        self.epoch = epoch
        self.factor = factor

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch != self.epoch:
            return
        for config in trainer.lr_scheduler_configs:
            schedule = cast(LambdaLR, config.scheduler)
            schedule.base_lrs = [rate * self.factor for rate in schedule.base_lrs]
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] *= self.factor
