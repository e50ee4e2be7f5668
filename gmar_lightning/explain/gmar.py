"""GMAR: gradient-driven multi-head attention rollout (arXiv 2504.19414)."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, get_args

import torch
from torch import Tensor, nn

from gmar_lightning.explain.candidates import candidates, said
from gmar_lightning.explain.errors import UnsupportedModelError, WrongModuleError
from gmar_lightning.explain.importance import Norm
from gmar_lightning.explain.inputs import (
    Goal,
    Inputs,
    batch_size,
    checked_targets,
    classifier_of,
    micro_batches,
    model_inputs,
    named_inputs,
)
from gmar_lightning.explain.isolation import undisturbed
from gmar_lightning.explain.lifted import with_gradients_lifted
from gmar_lightning.explain.measure import Measured, measure
from gmar_lightning.explain.nested import rows_of
from gmar_lightning.explain.notebook import result_page
from gmar_lightning.explain.output import Output, check_output, probabilities
from gmar_lightning.explain.rollout import Rollout, forms_of, to_grid
from gmar_lightning.explain.sweep import Form, HeadMaps
from gmar_lightning.explain.tokens import TokenLayout


@dataclass(frozen=True, eq=False)
class GMARResult:
    """An explanation of a batch; every tensor is detached, float32, on the model's device.

    (For a float64 model the tensors are float64.)

    Attributes:
        heatmaps: `(batch, grid_h, grid_w)`, non-negative, one map per image, not scaled: the first form asked
            for. `(batch, tokens)` for a model that reads token sequences. None where a picture cannot be derived.
        importance: `(batch, layers, heads)`, norm of the gradient of the logit with respect to each attention
            map: how sensitive the answer is to the map. NaN where a layer has fewer heads than the widest one.
        head_weights: `(batch, layers, heads)`, importance as a share of its layer.
        logits: `(batch, classes)`, of the explained forward pass; None when a callable says what is explained.
        targets: `(batch,)`, the classes explained; None likewise.
        layers: Module path of each attention layer, in forward order; a final attention pool is one of them. Calls
            of one layer that are made side by side (differential attention) are numbered, `path:0`, `path:1`.
        contribution: `(batch, layers, heads)`, `sum dO * O` of each head: what it adds to the answer to first
            order, for (positive) or against (negative) it.
        score: `(batch,)`, the number explained: the logit of the target, or what a callable target returned.
        maps: For each form asked for, its maps, shaped as `heatmaps`.
        head_maps: `(batch, layers, heads, grid_h, grid_w)`, what each head attends to on behalf of the readout;
            None unless asked for.
        signals: For each name of `signals.SIGNALS` (which defines them) a `(batch, layers, heads)`; empty unless
            asked for.
        runner_up: The map of the first form for the runner-up class, shaped as `heatmaps`; None unless asked for, and
            where there is no second class or `scope` is not "whole".
        scope: What the picture covers: "whole", "last stage, 7 x 7" (a rollout over the last layers that share one
            grid of the whole image; exact for those), or "none: " and the reason why `heatmaps` is None.
        output: What the logits are, "logits", "probabilities" or "multilabel", see `gmar`; None when it is not known.
    """

    heatmaps: Tensor | None
    importance: Tensor
    head_weights: Tensor
    logits: Tensor | None
    targets: Tensor | None
    layers: tuple[str, ...]
    contribution: Tensor
    score: Tensor
    maps: Mapping[str, Tensor] = field(default_factory=dict)
    head_maps: Tensor | None = None
    signals: Mapping[str, Tensor] = field(default_factory=dict)
    runner_up: Tensor | None = None
    scope: str = "whole"
    output: Output | None = None

    @property
    def probabilities(self) -> Tensor | None:
        """How probable each class is, `(batch, classes)`; None when it is not known what the logits are.

        A single logit decides between two classes, and gets two columns.
        """
        return None if self.logits is None else probabilities(self.logits, self.output)

    def _repr_html_(self) -> str:
        """What a notebook shows: the maps, the classes explained, and the heads."""
        targets = [None] * len(self.score) if self.targets is None else self.targets.tolist()
        captions = [
            f"#{index}" + ("" if target is None else f" class {target}") + f", score {score:.3g}"
            for index, (target, score) in enumerate(zip(targets, self.score.tolist(), strict=True))
        ]
        maps = None if self.heatmaps is None else self.heatmaps.float().cpu().numpy()
        return result_page(maps, self.head_weights.float().cpu().numpy(), captions)


def gmar(
    model: nn.Module,
    images: Any,
    targets: Goal = None,
    *,
    norm: Norm = "l1",
    rollout: Rollout | Sequence[Rollout] = "gradient",
    residual: float | None = None,
    micro_batch_size: int | None = None,
    module: str | None = None,
    signals: bool = False,
    head_maps: HeadMaps = False,
    runner_up: bool = False,
    inputs: Inputs = None,
    output: Output | None = None,
) -> GMARResult:
    """Explain a batch: one heatmap per image, one importance per attention head.

    The model may be in any mode, on any device, compiled or not, frozen or not, with or without gradient
    checkpointing; the call may sit under `no_grad` or `inference_mode`. Nothing about the model changes.
    Cost: one forward and one backward over activations, a little more than two forwards, however many forms,
    signals and head maps are asked for.

    Args:
        model: Takes images `(batch, channels, height, width)` and returns logits `(batch, classes)`, as a
            tensor or as an object with `.logits`; anything else when `targets` is a callable.
        images: The batch; or a mapping of keyword arguments (`{"pixel_values": ...}`, or `input_ids` and
            `attention_mask` of a text encoder, whose relevance is then per token with padding at zero). With
            `inputs`, a batch of any kind.
        targets: `(batch,)` class indices; None explains the predicted class; or a callable `(output) -> (batch,)`
            on whatever the model returns (`gmar_lightning.targets`).
        norm: How a head's gradient becomes its score: "l1", "l2", or "uniform" (heads weigh the same;
            importance is still the L1 norm).
        rollout: One form or several: "gradient" (gated by the positive gradient, the map to look at), "paper"
            (arXiv 2504.19414 read literally), "flow", "rollout" (plain attention rollout), "last_layer"; see
            `BackwardRows` and `paper_row`. All forms come from the same pass.
        residual: Weight of the residual path, 1 when None.
        micro_batch_size: Images per forward; bounds memory, does not change the result.
        module: Dotted path of the classifier inside `model`, when `model` itself is something else.
        signals: Also compute the signals per head that `signals.SIGNALS` defines.
        head_maps: Also return what each head attends to: the row of its map that belongs to the readout (the mean
            of the pooled rows under mean pooling, the row of the attention pool before one), gated by the positive
            gradient; "plain" for the attention itself.
        inputs: A callable that makes of the batch what `forward` takes: a tensor, a tuple of arguments, or a
            mapping of keyword arguments, nested as need be. The first tensor `(batch, channels, height, width)`
            whose name says no mask is the image; a pair `(arguments, name)` says otherwise, by name, position or
            path (`0.image`). Called on the whole batch, and on each part of one that is cut by `micro_batch_size`:
            a batch is cut as lists, mappings and tensors with a row per image, or as a list of samples.
        runner_up: Also return the map of the most probable class beside the explained one, for one more backward
            through the same graph: a map that is the same for both is blind to the class.
        output: What the model returns for its classes: "logits" (softmax; sigmoid for a single one, whose sign is the
            class), "probabilities" already, or "multilabel" (each label's sigmoid). None finds out where that is
            certain (`output.kind_of`), and otherwise speaks of scores. Decides what is said, not what is explained.

    Returns:
        The explanation. Row i of a batch equals image i alone. Models without one set of tokens for all layers
        (windowed, pooled, hierarchical, cross attention) have exact numbers per head, and a picture of their last
        stage or none, see `GMARResult.scope`.

    Raises:
        UnsupportedModelError: When the picture cannot be derived; says what was seen.
        ValueError: For arguments that do not fit.
    """
    check_form(norm, rollout, residual, micro_batch_size, output)
    if head_maps not in (False, True, "plain"):
        raise ValueError(f'head_maps must be True, False or "plain", got {head_maps!r}')
    factor = 1.0 if residual is None else residual
    form = Form(norm, forms_of(rollout), factor, signals, head_maps, runner_up)
    classifier = classifier_of(model, module)
    # Everything the forward could change is kept before the first line of it runs and put back on every
    # exit.
    with undisturbed(classifier):
        count = batch_size(named_inputs(images, inputs))
        goals = checked_targets(targets, count)
        parts = micro_batches(images, count, goals, min(micro_batch_size or count, count))
        explain = functools.partial(_explain, classifier, form=form, inputs=inputs, output=output)
        # Tried as the model stands first; `no_grad` and `detach` inside its forward are lifted only when
        # that fails.
        try:
            found = with_gradients_lifted(lambda: _joined([explain(*part) for part in parts]))
        except WrongModuleError as error:
            few = named_inputs(rows_of(images, slice(0, 2), count), inputs)
            raise UnsupportedModelError(f"{error} {said(candidates(classifier, few, module))}") from error
    if len(found.score) != count:
        raise ValueError(
            f"the batch has {count} images, its {len(parts)} parts have {len(found.score)}: it cannot be cut into "
            "images. Return tensors with a row per image from inputs=, or leave micro_batch_size out."
        )
    return found


def _explain(
    classifier: nn.Module, batch: Any, targets: Goal, *, form: Form, inputs: Inputs, output: Output | None
) -> GMARResult:
    given = model_inputs(classifier, batch, inputs)
    seen = measure(classifier, given, targets, form, output)
    # None: as many images as tokens, and nothing tells the two axes apart. Half the batch does.
    if seen is None:
        count = batch_size(given)
        halves = micro_batches(batch, count, targets, -(-count // 2))
        explain = functools.partial(_explain, classifier, form=form, inputs=inputs, output=output)
        return _joined([explain(*half) for half in halves])
    numbers, picture, score = seen.numbers, seen.picture, seen.explained.score
    maps, other = {}, None
    if seen.sweep is not None and picture is not None:
        fold = functools.partial(_folded, layout=picture.layout, padding=picture.padding)
        maps = {name: fold(row) for name, row in seen.sweep.maps().items()}
        other = None if seen.runner_up is None else fold(seen.runner_up)
    return GMARResult(
        heatmaps=maps.get(form.rollouts[0]),
        importance=_ragged([layer.importance for layer in numbers]),
        head_weights=_ragged([layer.weights for layer in numbers]),
        logits=_at_least_float32(seen.explained.logits),
        targets=seen.explained.targets,
        layers=seen.layers,
        contribution=_ragged([layer.contribution for layer in numbers]),
        score=score if score.dtype == torch.float64 else score.float(),
        maps=maps,
        head_maps=_head_maps(seen) if form.head_maps else None,
        signals={name: _ragged([layer.signals[name] for layer in numbers]) for name in numbers[0].signals},
        runner_up=other,
        scope=seen.scope,
        output=seen.explained.kind,
    )


def _at_least_float32(logits: Tensor | None) -> Tensor | None:
    return logits if logits is None or logits.dtype == torch.float64 else logits.float()


def _head_maps(seen: Measured) -> Tensor | None:
    """Head maps of every layer; NaN for layers before the stage that is drawn."""
    if seen.sweep is None or seen.picture is None:
        return None
    picture, sweep = seen.picture, seen.sweep
    rows = [sweep.head_maps[index] for index in range(len(sweep.calls))]
    earlier = [
        rows[0].new_full((*layer.importance.shape, rows[0].shape[-1]), torch.nan)
        for layer in seen.numbers[: picture.first]
    ]
    padding = picture.padding
    return _folded(
        _ragged([*earlier, *rows]), picture.layout, None if padding is None else padding[:, None, None]
    )


def _folded(row: Tensor, layout: TokenLayout, padding: Tensor | None) -> Tensor:
    if layout.grid is not None:
        return to_grid(row, layout.prefix, layout.grid)
    return row if padding is None else row * padding.to(row.dtype)


def _joined(parts: list[GMARResult]) -> GMARResult:
    if len(parts) == 1:
        return parts[0]
    return GMARResult(
        **{item.name: _cat([getattr(part, item.name) for part in parts]) for item in fields(GMARResult)}
    )


def _cat(values: list[Any]) -> Any:
    if isinstance(values[0], Mapping):
        return {key: _cat([value[key] for value in values]) for key in values[0]}
    return torch.cat(values) if isinstance(values[0], Tensor) else values[0]


def _ragged(per_layer: list[Tensor]) -> Tensor:
    """Stack `(batch, heads, ...)` of every layer, padded with NaN to the widest layer."""
    widest = max(layer.shape[1] for layer in per_layer)
    # NaN, not zero: a head that does not exist must not look like a head that died.
    stacked = per_layer[0].new_full(
        (len(per_layer[0]), len(per_layer), widest, *per_layer[0].shape[2:]), torch.nan
    )
    for index, layer in enumerate(per_layer):
        stacked[:, index, : layer.shape[1]] = layer
    return stacked


def check_form(
    norm: str,
    rollout: Rollout | Sequence[Rollout],
    residual: float | None,
    micro_batch_size: int | None,
    output: Output | None = None,
) -> None:
    """Check the arguments that choose the form of the explanation, and say what the output is.

    Raises:
        ValueError: With the allowed values.
    """
    if norm not in get_args(Norm):
        raise ValueError(f"norm={norm!r} is unknown; choose one of {', '.join(map(repr, get_args(Norm)))}")
    forms_of(rollout)
    check_output(output)
    if residual is not None and not residual >= 0:
        raise ValueError(f"residual must be >= 0, got {residual}")
    if micro_batch_size is not None and micro_batch_size < 1:
        raise ValueError(f"micro_batch_size must be >= 1, got {micro_batch_size}")
