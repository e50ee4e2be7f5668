"""The command line of `train.py`: Lightning's own, with this project's defaults."""

import os
from pathlib import Path

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from gmar_lightning.training.callbacks import FreezeBackbone, ScaleLearningRate
from gmar_lightning.training.data import Digits, ImageData
from gmar_lightning.training.downloads import Cifar10, Cifar100, OxfordPets
from gmar_lightning.training.evidence import EvidenceShare
from gmar_lightning.training.folder import ImageFolder
from gmar_lightning.training.model import Classifier
from gmar_lightning.training.planted import Cells, WatermarkedDigits

# Imported so that short names, as in `--data Digits`, are found.
SHORT_NAMES = (
    *(Cells, Cifar10, Cifar100, Digits, ImageFolder, OxfordPets, WatermarkedDigits),
    *(EvidenceShare, FreezeBackbone, ScaleLearningRate),
)


class TrainCLI(LightningCLI):
    """LightningCLI in which the data tells the model its classes and image size, and runs have a name."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add `--run_name` and the links from data to model."""
        parser.add_argument("--run_name", default="run", help="Name of the run in every logger.")
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")
        parser.link_arguments("data.image_size", "model.image_size", apply_on="instantiate")

    def before_instantiate_classes(self) -> None:
        """Give the run's name to each logger that has none of its own."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        loggers = config.trainer.logger
        for logger in loggers if isinstance(loggers, list) else [loggers]:
            arguments = getattr(logger, "init_args", None)
            if arguments is not None and "name" in arguments and arguments.name is None:
                arguments.name = config.run_name


def main(defaults: Path | None = None, arguments: list[str] | None = None) -> TrainCLI:
    """Run the command line.

    Args:
        defaults: a configuration that every other one is a delta of.
        arguments: what to run; None reads the process's own arguments.

    Returns:
        The command line after the run, with `model`, `datamodule` and `trainer`.
    """
    # Weights & Biases needs no account and asks nothing, unless WANDB_MODE=online is set.
    os.environ.setdefault("WANDB_MODE", "offline")
    parser_kwargs = {"default_config_files": [str(defaults)]} if defaults else {}
    return TrainCLI(
        Classifier,
        ImageData,
        subclass_mode_data=True,
        parser_kwargs=dict.fromkeys(TrainCLI.subcommands(), parser_kwargs),
        seed_everything_default=7,
        args=arguments,
    )
