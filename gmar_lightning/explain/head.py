"""Whether what a model returns are class scores, or features from which a head outside of it would go on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gmar_lightning.explain.attention import Recording, reaches
from gmar_lightning.explain.errors import UnsupportedModelError

# Parts of the names of autograd nodes that mix channels, as every classifier does: matrix products, convolutions,
# distances to prototypes. A name too many only means that a model is not refused.
_MIXES_CHANNELS = ("mm", "mv", "dot", "linear", "conv", "dist", "embedding", "attention")
# What a hidden layer ends in. Softmax, sigmoid and their logarithms are left out: classifiers end in those.
_ENDS_A_HIDDEN_LAYER = frozenset(
    {"Tanh", "Relu", "Gelu", "Silu", "LeakyRelu", "Elu", "Hardswish", "Hardtanh", "Mish", "PreluKernel"}
    | {"NativeLayerNorm", "NativeBatchNorm", "CudnnBatchNorm", "NativeGroupNorm", "FusedRmsNorm"}
)
# Rounding in the length of a vector that was normalised.
_UNIT = 1e-4

WAYS_OUT = (
    "Name with module= a part whose forward ends in class scores (backbone and head together), or leave module= "
    "out if the whole model returns them. For an embedding, or with a head that lies outside, say what is explained "
    "with a callable target: gmar_lightning.targets.Similarity(embedding), or lambda output: head(output)[:, 3]."
)


def check_class_scores(found: Recording, output: Tensor, image: Tensor | None) -> None:
    """Refuse features in the place of class scores: the largest of them is no class.

    A classifier mixes the channels of its tokens into scores. So on every way back from a score there is a matrix
    product (a convolution, distances) behind the last attention, with at most a scaling, a softmax or a sum of heads
    after it. Features are seen by what they lack: they are as wide as the tokens, and the residual stream leads
    into them past every product, or they end as a hidden layer does; or they are vectors of length 1.

    Args:
        found: What the forward pass showed.
        output: `(batch, classes)`, attached to the graph.
        image: The images at the head of the graph, if there are any.

    Raises:
        UnsupportedModelError: Saying why these are features, and what to do.
    """
    last = found.calls[-1]
    widths = {tokens.shape[-1] for tokens in found.trace.tokens.leaving} | {
        last.q.shape[1] * last.v.shape[-1]
    }
    why = _of_length_one(output)
    # One output per channel of the tokens, or per channel of several tokens side by side.
    if not why and any(output.shape[1] % width == 0 for width in widths if width > 1):
        why = _without_classifier(found, output, image)
    if why:
        raise UnsupportedModelError(
            f"the forward pass returns features instead of class scores: its {output.shape[1]} outputs are {why}. "
            + WAYS_OUT
        )


def _of_length_one(output: Tensor) -> str:
    rows = output.detach().float()
    unit = (
        ((rows.norm(dim=-1) - 1).abs() < _UNIT).all()
        if output.dtype != torch.bfloat16
        else torch.tensor(False)
    )
    # Sure probabilities have length 1 as well; of one or two outputs, length says nothing.
    return "an embedding, normalised to length 1" if output.shape[1] > 2 and unit and (rows < 0).any() else ""


def _without_classifier(found: Recording, output: Tensor, image: Tensor | None) -> str:
    """Why no classifier made the output, from the graph behind it; empty when one may have."""
    last, edge = found.calls[-1], found.calls[-1].edge
    if output.grad_fn is None or edge is None:
        return ""
    passed, products = _up_to_products(output.grad_fn)
    sources = {image.grad_fn} if image is not None and image.grad_fn is not None else set[Any]()
    sources |= (
        {found.calls[0].edge.node} if found.calls[0].edge is not None and len(found.calls) > 1 else set()
    )
    age = edge.node._sequence_nr()
    before = [node for node in (*passed, *products) if node.next_functions and node._sequence_nr() < age]
    channels = f"channels of the tokens behind {last.name} ({last.owner}), with no classifier after them"
    if before and reaches(before, sources):
        return channels
    # A residual branch beside what it was computed from: two heads beside each other do not read one another.
    if any(_comes_from(one, other) for one in products for other in products if one is not other):
        return channels
    if any(_kind(node) in _ENDS_A_HIDDEN_LAYER for node in passed):
        return "as many as the tokens have channels, and end in a normalisation or an activation"
    return ""


def _up_to_products(start: Any) -> tuple[list[Any], list[Any]]:
    """Graph nodes from the output back to the first product on each way, and those products."""
    passed, products, seen, stack = [], [], {start}, [start]
    while stack:
        node = stack.pop()
        if _mixes_channels(node):
            products.append(node)
            continue
        passed.append(node)
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                stack.append(parent)
    return passed, products


def _mixes_channels(node: Any) -> bool:
    # What a function of the user's own does inside is not known, so it may well be the classifier.
    own = isinstance(node, torch.autograd.function.BackwardCFunction)
    name = type(node).__name__.lower()
    return own or any(part in name for part in _MIXES_CHANNELS) or _compares(node)


def _compares(node: Any) -> bool:
    """Whether a sum or norm over the last axis of `(batch, classes, channels)` is a comparison written by hand.

    A mean over tokens that stand last, `(batch, channels, tokens)`, is none: what it sums are the tokens, not
    products or differences with the weights of each class.
    """
    name, dims = _kind(node), getattr(node, "_saved_dim", None)
    if dims not in ((2,), (2**64 - 1,)):
        return False
    if name in ("LinalgVectorNorm", "Norm"):
        return node._saved_self.ndim == 3
    sums = name in ("Sum", "Mean") and len(node._saved_self_sym_sizes) == 3
    return sums and any(
        _kind(parent) in ("Mul", "Sub", "Pow", "Abs", "Div") for parent, _ in node.next_functions
    )


def _kind(node: Any) -> str:
    return type(node).__name__.rstrip("0123456789").removesuffix("Backward")


def _comes_from(node: Any, other: Any) -> bool:
    parents: Sequence[Any] = [parent for parent, _ in node.next_functions if parent is not None]
    return bool(parents) and reaches(parents, {other}, oldest=other._sequence_nr())
