"""Parameter groups and the learning-rate schedule."""

import math
from collections.abc import Callable
from typing import Any

from timm.optim import param_groups_layer_decay  # pyright: ignore[reportPrivateImportUsage]  # timm has no __all__
from torch import nn


def parameter_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    layer_decay: float = 1.0,
    weight_decay_of: dict[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Group parameters by weight decay and, if asked, by depth.

    Biases, norms and what the model itself exempts are not decayed.

    Args:
        model: a timm model.
        lr: learning rate of the head.
        weight_decay: decay of the weights.
        layer_decay: factor per layer from the head down to the patch embedding, for instance 0.75;
            1 gives every layer the same rate.
        weight_decay_of: another decay for the weights whose name contains the key, for instance
            `{".attn.": 0.5}`.

    Returns:
        Groups for a torch optimizer, each with its own `lr` and `weight_decay`.

    Raises:
        ValueError: `layer_decay` is not in (0, 1], or a key of `weight_decay_of` fits no decayed weight.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay must lie in (0, 1], got {layer_decay}")
    exempt = getattr(model, "no_weight_decay", set)()
    by_depth = param_groups_layer_decay(
        model, weight_decay, no_weight_decay_list=exempt, layer_decay=layer_decay
    )
    groups = [
        {
            "params": group["params"],
            "weight_decay": group["weight_decay"],
            "lr": lr * group["lr_scale"],
        }
        for group in by_depth
    ]
    for key, decay in (weight_decay_of or {}).items():
        groups = _with_other_decay(groups, model, key, decay)
    return groups


def _with_other_decay(
    groups: list[dict[str, Any]], model: nn.Module, key: str, decay: float
) -> list[dict[str, Any]]:
    chosen = {id(parameter) for name, parameter in model.named_parameters() if key in name}
    split: list[dict[str, Any]] = []
    moved = 0
    for group in groups:
        inside = [p for p in group["params"] if id(p) in chosen and group["weight_decay"] > 0]
        outside = [p for p in group["params"] if not any(p is other for other in inside)]
        moved += len(inside)
        split += [{**group, "params": outside}] if outside else []
        split += [{**group, "params": inside, "weight_decay": decay}] if inside else []
    if not moved:
        raise ValueError(f"weight_decay_of: no decayed weight has {key!r} in its name")
    return split


def warmup_cosine(total_steps: float, warmup: float, final: float = 0.01) -> Callable[[int], float]:
    """Return the factor on the learning rate at each optimizer step: linear up, then a cosine down.

    Args:
        total_steps: optimizer steps of the whole run.
        warmup: share of the run spent warming up, in [0, 1).
        final: factor at the end.

    Raises:
        ValueError: the run has no end, or `warmup` is outside [0, 1).
    """
    if not math.isfinite(total_steps):
        raise ValueError("the cosine schedule needs to know where the run ends: set max_epochs or max_steps")
    if not 0 <= warmup < 1:
        raise ValueError(f"warmup is a share of the run in [0, 1), got {warmup}")
    rising = round(warmup * total_steps)

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / (rising + 1)
        done = min(1.0, (step - rising) / max(1.0, total_steps - rising))
        return final + (1 - final) * (1 + math.cos(math.pi * done)) / 2

    return factor
