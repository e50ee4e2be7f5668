"""GMAR explanations and attention-head health for Vision Transformers, while they train."""

from typing import TYPE_CHECKING, Any

from gmar_lightning.explain.ablation import HeadAblation, ablate_heads
from gmar_lightning.explain.attention import record_attention
from gmar_lightning.explain.check import Verdict, check
from gmar_lightning.explain.errors import UnsupportedModelError
from gmar_lightning.explain.gmar import GMARResult, gmar
from gmar_lightning.monitor.collapse import CollapseDetector
from gmar_lightning.monitor.events import HeadEvent, HeadState
from gmar_lightning.monitor.history import History
from gmar_lightning.show.ranking import prune_order
from gmar_lightning.version import __version__ as __version__

if TYPE_CHECKING:
    from gmar_lightning.callback import GMARCallback

__all__ = [
    "CollapseDetector",
    "GMARCallback",
    "GMARResult",
    "HeadAblation",
    "HeadEvent",
    "HeadState",
    "History",
    "UnsupportedModelError",
    "Verdict",
    "ablate_heads",
    "check",
    "gmar",
    "prune_order",
    "record_attention",
]


def __getattr__(name: str) -> Any:
    # Only the callback needs Lightning; everything else works where there is none.
    if name == "GMARCallback":
        from gmar_lightning.callback import GMARCallback

        return GMARCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
