"""Train a Vision Transformer and watch its attention heads: ``python train.py fit --config configs/digits.yaml``."""

from pathlib import Path

from gmar_lightning.training.cli import main

if __name__ == "__main__":
    main(defaults=Path(__file__).parent / "configs" / "base.yaml")
