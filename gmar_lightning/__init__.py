"""GMAR explanations and attention-head health for Vision Transformers, while they train."""

__version__ = "0.1.0"
