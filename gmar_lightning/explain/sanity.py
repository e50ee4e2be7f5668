"""Two sanity checks of heatmaps: do they depend on the class, and on what the model has learnt?

Both compare a map with a second map of the same image by rank correlation. A map that does not move says nothing
about the class (or about the weights), however plausible it looks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gmar_lightning.explain.explained import runner_up
from gmar_lightning.explain.gmar import GMARResult
from gmar_lightning.explain.inputs import classifier_of

Explain = Callable[..., GMARResult]

# Wrappers that hold parameters on behalf of the modules inside: theirs may not be exchanged behind their back.
_SHARDING = ("FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine")


class SkippedCheckError(RuntimeError):
    """A check that cannot be made on this model; says why."""


def class_sensitivity(
    model: nn.Module, images: Any, heatmaps: Tensor, targets: Tensor, logits: Tensor, explain: Explain
) -> Tensor:
    """Rank correlation of each map with the map of the runner-up class (as Rebuffi et al. 2020).

    1 means that the map is the same whatever class is explained: it is class-blind, and cannot answer "why this
    class?". Plain rollout scores 1 by construction.

    Cost: one more forward and backward; where `gmar(runner_up=True)` has the second map from the graph of the first,
    `rank_correlation` of the two is the same for one more backward.

    Args:
        model: What was explained.
        images: The images that were explained.
        heatmaps: Their maps by `explain`, `(batch, grid_h, grid_w)`.
        targets: The classes explained, `(batch,)`.
        logits: `(batch, classes)`.
        explain: `gmar` with the form of the explanation filled in; called as `explain(model, images, targets)`.

    Returns:
        `(batch,)` in [-1, 1]; NaN where a map has no order.

    Raises:
        SkippedCheckError: There is but one class.
    """
    if logits.shape[1] < 2:
        raise SkippedCheckError("there is no second class to explain")
    others = explain(model, images, runner_up(logits, targets)).heatmaps
    assert others is not None, "the same model had a picture"
    return rank_correlation(heatmaps, others)


def randomisation(
    model: nn.Module,
    images: Any,
    heatmaps: Tensor,
    targets: Any,
    explain: Explain,
    *,
    layer: str,
    module: str | None = None,
    seed: int = 0,
) -> Tensor:
    """Rank correlation of each map with the map of the same class after the top block lost its weights.

    Parameter randomisation test (Adebayo et al. 2018, arXiv 1810.03292): a map that survives it shows edges and
    positions rather than what the model has learnt. Here every tensor of the top block is shuffled, which keeps the
    distribution of its values. Low is healthy.

    Cost: one more forward and backward, and one copy of the top block's weights.

    Args:
        model: What was explained.
        images: The images that were explained.
        heatmaps: Their maps by `explain`, `(batch, grid_h, grid_w)`.
        targets: What was explained, as for `gmar`.
        explain: `gmar` with the form of the explanation filled in; called as `explain(model, images, targets)`.
        layer: Path of the last attention layer, as `GMARResult.layers` has it.
        module: Dotted path of the classifier inside `model`.
        seed: Of the shuffling.

    Returns:
        `(batch,)` in [-1, 1]; NaN where a map has no order.

    Raises:
        SkippedCheckError: The weights cannot be exchanged for a moment.
    """
    with shuffled_top_block(classifier_of(model, module), layer, seed):
        others = explain(model, images, targets).heatmaps
    assert others is not None, "the same model had a picture"
    return rank_correlation(heatmaps, others)


@contextmanager
def shuffled_top_block(classifier: nn.Module, layer: str, seed: int = 0) -> Iterator[nn.Module]:
    """Exchange the parameters of the block around an attention layer for shuffled ones, for a moment.

    The parameters themselves are never written: other `nn.Parameter` objects take their places and leave again, so
    values, version counters, `.grad`, hooks and what an optimizer holds stay as they are, also after an exception.

    Args:
        classifier: The model.
        layer: Path of its last attention layer.
        seed: Of the shuffling; no global random state is touched.

    Yields:
        The block whose weights are shuffled.

    Raises:
        SkippedCheckError: The parameters are sharded, of a special kind, or not found.
    """
    block = _block_around(classifier, layer)
    _check_exchangeable(classifier, block)
    places = [
        (owner, name, parameter)
        for owner in block.modules()
        for name, parameter in list(owner.named_parameters(recurse=False))
    ]
    generator = torch.Generator().manual_seed(seed)
    try:
        for owner, name, parameter in places:
            # One permutation per tensor; drawn on the CPU, so that every device shuffles alike.
            order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
            values = parameter.detach().flatten()[order].view(parameter.shape)
            setattr(owner, name, nn.Parameter(values, requires_grad=parameter.requires_grad))
        yield block
    finally:
        for owner, name, parameter in places:
            setattr(owner, name, parameter)


def rank_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Spearman correlation of two maps per image; ties share their average rank.

    Args:
        first: `(batch, grid_h, grid_w)`.
        second: The same shape.

    Returns:
        `(batch,)`; NaN where a map is constant or not finite, as it has no order.
    """
    ranks = [_centred_ranks(maps.detach().double().flatten(1).cpu()) for maps in (first, second)]
    norms = ranks[0].norm(dim=1) * ranks[1].norm(dim=1)
    return torch.where(norms > 0, (ranks[0] * ranks[1]).sum(1) / norms, torch.nan)


def _centred_ranks(values: Tensor) -> Tensor:
    ordered = values.sort(1).values
    # The average rank of a value lies between the places of its first and its last copy.
    first = torch.searchsorted(ordered, values.contiguous(), right=False)
    last = torch.searchsorted(ordered, values.contiguous(), right=True)
    ranks = (first + last - 1).double() / 2
    centred = ranks - ranks.mean(1, keepdim=True)
    # No order in a map with NaN: its correlation becomes NaN through a norm of zero.
    return centred.where(values.isfinite().all(1, keepdim=True), 0.0)


def _block_around(classifier: nn.Module, layer: str) -> nn.Module:
    """The module that holds the attention layer beside its MLP; the layer itself where that is the whole model."""
    parent = layer.rpartition(".")[0]
    try:
        block = classifier.get_submodule(parent or layer)
    except AttributeError:
        raise SkippedCheckError(f"{layer} is no module of the model") from None
    if block is classifier or isinstance(block, (nn.ModuleList, nn.Sequential)):
        block = classifier.get_submodule(layer)
    if not any(True for _ in block.parameters()):
        raise SkippedCheckError(f"the block around {layer} has no parameters of its own")
    return block


def _check_exchangeable(classifier: nn.Module, block: nn.Module) -> None:
    sharding = next((m for m in classifier.modules() if _is_sharding(m)), None)
    if sharding is not None:
        raise SkippedCheckError(f"the parameters are sharded by {type(sharding).__name__}")
    for name, parameter in block.named_parameters():
        # Tensor subclasses (DTensor, quantised weights) do not promise that their elements can be permuted.
        if (
            type(parameter.data) is not Tensor
            or not parameter.is_floating_point()
            or hasattr(parameter, "ds_id")
        ):
            raise SkippedCheckError(f"{name} is a {type(parameter.data).__name__} of {parameter.dtype}")


def _is_sharding(module: nn.Module) -> bool:
    return any(kind.__name__ in _SHARDING for kind in type(module).__mro__)
