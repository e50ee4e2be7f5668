"""GMAR explanations and attention-head health for Vision Transformers, while they train."""

from gmar_lightning.explain.ablation import ablate_heads as ablate_heads
from gmar_lightning.explain.attention import record_attention as record_attention
from gmar_lightning.explain.errors import UnsupportedModelError as UnsupportedModelError
from gmar_lightning.explain.gmar import GMARResult as GMARResult
from gmar_lightning.explain.gmar import gmar as gmar

__version__ = "0.1.0"
