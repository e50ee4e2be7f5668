"""Models whose rollout is not a product of plain attention maps, refused by name."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from gmar_lightning.explain.attention import AttentionCall, Recording
from gmar_lightning.explain.errors import CutOffError, NoPictureError, UnsupportedModelError, WrongModuleError


def check_visible(found: Recording) -> None:
    """Refuse a model part of whose attention is not seen, or is no softmax attention that multiplies values.

    Raises:
        UnsupportedModelError: Naming the module, its class and the reason.
    """
    trace = found.trace
    # A softmax inside a module whose attention was seen belongs to that attention (a sum of two maps).
    seen = {_named(call) for call in found.calls}
    hand = trace.softmaxes + [one for one in trace.suspects if not seen or one in seen]
    if hand:
        raise UnsupportedModelError(by_hand(hand))
    if not found.calls and found.aside:
        raise CutOffError(under_no_grad(found.aside))
    if not found.calls:
        quiet = f" {_listed(trace.silent)} ran without calling it." if trace.silent else ""
        raise WrongModuleError(
            f"no attention seen: no call of scaled_dot_product_attention in the forward pass.{quiet} "
            "If the transformer sits elsewhere, name with module= the part that holds it and its head; a scripted or "
            "exported model must be explained as the module it was made from."
        )
    without = [call for call in found.calls if call.edge is None]
    if without:
        raise UnsupportedModelError(under_no_grad(without))
    if trace.silent:
        raise UnsupportedModelError(
            f"{_listed(trace.silent)} ran without calling scaled_dot_product_attention: "
            "part of the attention (linear, channel or windowed attention, or an opaque kernel) is invisible."
        )


def check_plain_attention(found: Recording, batch: int) -> None:
    """Refuse every model whose rollout is not the product of plain token-to-token attention maps.

    Args:
        found: What a forward pass over `batch` images showed.
        batch: Number of images.

    Raises:
        NoPictureError: When the heads can be scored all the same; names the module, its class and the reason.
        UnsupportedModelError: When they cannot.
    """
    trace = found.trace
    check_visible(found)
    for call in found.calls:
        _check_shape(call, batch)
    _check_sequence(found.calls)
    for call in found.calls:
        _check_kind(call)
    if trace.mixers:
        raise UnsupportedModelError(
            f"tokens are mixed outside the attention, in {_listed(trace.mixers)}: "
            "a rollout of attention maps alone would misplace them."
        )


def check_reached(calls: Sequence[AttentionCall], grads: Sequence[Tensor | None]) -> list[Tensor]:
    """The gradients at the attention outputs, refusing a layer that the logits do not depend on.

    Raises:
        UnsupportedModelError: Naming the layer.
    """
    missed = [f"{call.name} ({call.owner})" for call, grad in zip(calls, grads, strict=True) if grad is None]
    if missed:
        raise CutOffError(
            f"{_listed(missed)} runs, but the logits do not depend on it: the classifier reads an earlier layer, "
            "or the result is detached. Take layers that are not read out of the model."
        )
    return [grad for grad in grads if grad is not None]


def by_hand(names: list[str]) -> str:
    """Why a softmax that nothing is known to be multiplied with cannot be explained."""
    return (
        f"attention computed by hand in {_listed(names)}: its maps do not pass scaled_dot_product_attention (talking "
        "heads, a linear or windowed variant, or a module written without it), so its heads cannot be scored."
    )


def check_differentiable(classifier: nn.Module) -> None:
    """Refuse layers quantised to integers, which pass no gradient on.

    Raises:
        UnsupportedModelError: Naming them.
    """
    quantised = [
        f"{name} ({type(module).__name__})"
        for name, module in classifier.named_modules()
        if ".quantized." in type(module).__module__ and next(module.children(), None) is None
    ]
    if quantised:
        raise UnsupportedModelError(
            f"{_listed(quantised)} computes in integers (int8 quantisation), which have no gradient. "
            "Explain the model "
            "that was quantised."
        )


def under_no_grad(calls: Sequence[AttentionCall]) -> str:
    """Why attention that no gradient reaches cannot be explained."""
    return (
        f"{_listed([_named(call) for call in calls])} runs under torch.no_grad(), on detached features or inside "
        "a custom autograd.Function in the model's own forward, so no gradient reaches its map. Freeze with "
        "requires_grad_(False) instead of no_grad()."
    )


def _check_shape(call: AttentionCall, batch: int) -> None:
    if call.q.ndim != 4 or call.q.shape[0] != batch:
        raise NoPictureError(
            f"{_named(call)} attends with queries of shape {tuple(call.q.shape)} for {batch} images: windowed, "
            "axial or merged attention, or several views of an image; expected (batch, heads, tokens, dim) over "
            "the whole image."
        )


def _check_kind(call: AttentionCall) -> None:
    if call.shared_qkv:
        raise UnsupportedModelError(
            f"{_named(call)} pools without parameters: queries, keys and values are one tensor."
        )
    if call.twin:
        raise NoPictureError(
            f"{_named(call)} makes two attention calls at once or on the same values (differential attention): its "
            "true map combines the two, and a head's share in it is not defined."
        )
    if call.detached:
        raise WrongModuleError(
            f"{_named(call)} does not continue the attention layers before it: two transformers, several passes "
            "over the image, or branches of different length. Name one classifier, head included, with module=."
        )
    if not call.output.requires_grad:
        raise CutOffError(under_no_grad([call]))


def _check_sequence(calls: list[AttentionCall]) -> None:
    tokens = calls[0].k.shape[-2]
    for layer, call in enumerate(calls):
        queries, keys = call.q.shape[-2], call.k.shape[-2]
        final_pool = call is calls[-1] and layer > 0 and call.is_pool
        if queries != keys and not final_pool:
            raise NoPictureError(
                f"{_named(call)} attends from {queries} queries to {keys} keys at layer {layer}: class "
                "attention, cross attention, pooled keys or keys of no token (sinks, prefix tuning); "
                "rollout needs square maps up to one final "
                "one-query pool."
            )
        if keys != tokens:
            raise NoPictureError(
                f"token count changes at layer {layer}: {_named(call)} sees {keys} tokens after "
                f"{tokens} before (hierarchical, or tokens dropped, merged or added)."
            )


def _named(call: AttentionCall) -> str:
    return f"{call.name} ({call.owner})"


def _listed(names: list[str]) -> str:
    unique = list(dict.fromkeys(names))
    return ", ".join(unique[:3]) + (f" and {len(unique) - 3} more" if len(unique) > 3 else "")
