"""Whether tokens, and images, stay apart outside the attention: tried out once per model, never assumed.

A rollout multiplies attention maps. That is the whole truth only when nothing else moves information from one
token to another: no convolution, no gate over positions, no attention that was not recorded. Class names do not
tell. So the model is run again with the outputs of its attention layers held at what they were, except for some
tokens, whose outputs (and whose part of the image) are replaced by noise. In a model that mixes tokens by attention
alone, every other token enters every later layer as before, and so does every token of the other image.

No gradient is needed, so that what has none (sorting, routing, detached statistics) is seen as well.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gmar_lightning.explain.attention import AttentionCall, Recording
from gmar_lightning.explain.errors import CutOffError, UnsupportedModelError
from gmar_lightning.explain.inputs import Goal, batch_size, forward, image_key, logits_of, micro_batches
from gmar_lightning.explain.intercept import CallArguments, intercept_attention, with_four_axes
from gmar_lightning.explain.isolation import isolated_random_state
from gmar_lightning.explain.noise import part_changed, with_noise
from gmar_lightning.explain.refusals import under_no_grad
from gmar_lightning.explain.structure import attributes_kept, gates_open, structure
from gmar_lightning.explain.trace import ModuleTrace, as_tokens

# Tokens are numbered at random; in trial b those change whose number has bit b set. With 6 bits any two of up to 64
# tokens are told apart for certain, of more with probability 63/64: an exchange of just two tokens is seen, too.
_BITS = 6
# Relative difference below which a row counts as unchanged: float32 rounding of kernels that add in any order.
_SAME = 1e-6
# Image-wise changes that reach more than this share of the tokens say nothing (a stem that sees everything).
_MOST_REACHED = 0.7

_CHECKED: weakref.WeakKeyDictionary[nn.Module, set[Any]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class _Seen:
    """What entered one attention call, and what left it."""

    entering: tuple[Tensor, ...]  # (batch, tokens, heads * dim) each
    output: Tensor


def check_apart(
    classifier: nn.Module,
    inputs: dict[str, Any],
    found: Recording,
    read: Tensor,
    padding: Tensor | None = None,
    goal: Goal = None,
) -> None:
    """Refuse a model in which something beside the recorded attention mixes tokens, or images of a batch.

    Runs five forward passes over two images (eight over one) without gradients, once per model structure and
    input shape: later calls return at once.

    Args:
        classifier: The module, prepared as for an explanation.
        inputs: Its inputs, of at least one image.
        found: What an earlier pass over them showed.
        read: The readout row of that pass, `(batch, tokens)`.
        padding: `(batch, tokens)`, 0 at padding, or None.
        goal: What is explained; of a callable, the number takes the place of the logits.

    Raises:
        UnsupportedModelError: Naming the layers between which tokens are mixed or replaced.
    """
    count = batch_size(inputs)
    inputs, goal = micro_batches(inputs, count, goal, min(2, count))[0]
    outcome, key = logits_of, structure(classifier, inputs)
    if goal is not None and not isinstance(goal, Tensor):
        outcome, key = (lambda output: goal(output)[:, None]), (key, str(goal))
    known = _CHECKED.setdefault(classifier, set())
    if key in known:
        return
    trial = _Trial(classifier, inputs, found, padding, read, outcome)
    with attributes_kept(classifier), gates_open(classifier):
        trial.run_intact()
        if not trial.logits.isfinite().all():
            return  # nothing can be compared; a later call with finite images looks again
        trial.run_without_aside()
        for number, changed in enumerate(_trials(trial.read)):
            trial.run_changed(changed, number)
    known.add(key)


def _trials(read: Tensor) -> Iterator[Tensor]:
    """Which tokens change in each pass, `(batch, tokens)`; in the first pass of two images, one stays as it is."""
    batch, tokens = read.shape
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randperm(tokens, generator=generator)
    rows = [(numbers >> bit) % 2 == 1 for bit in range(_BITS)]
    # Last, any tokens but those that are read: the logits must stay.
    rows.append((torch.rand(tokens, generator=generator) < 0.7) & ~read[-1])
    if batch == 2:
        rows.insert(1, torch.zeros(tokens, dtype=torch.bool))
    for start in range(0, len(rows), batch):
        yield torch.stack(rows[start : start + batch])


class _Trial:
    """Forward passes of one model on the same images, with attention outputs under control."""

    def __init__(
        self,
        classifier: nn.Module,
        inputs: dict[str, Any],
        found: Recording,
        padding: Tensor | None,
        read: Tensor,
        outcome: Callable[[Any], Tensor] = logits_of,
    ) -> None:
        self.outcome = outcome
        calls = found.calls
        self.classifier, self.inputs, self.calls, self.aside = classifier, inputs, calls, found.aside
        self.order = {call.index: place for place, call in enumerate(calls)}
        self.batch = batch_size(inputs)
        self.tokens = calls[0].q.shape[-2]
        self.padded = torch.zeros(self.batch, self.tokens, dtype=torch.bool)
        if padding is not None:
            self.padded = padding[: self.batch].cpu() == 0
        self.read = torch.zeros_like(self.padded)
        if not calls[-1].is_pool:
            self.read = read[: self.batch].cpu() > 0
        # Counted, for without gradients tensors cannot be told apart by where they lead.
        self.read_place = found.trace.tokens.read_place
        self.tokens_read: Tensor | None = None
        self.intact: Tensor | None = None
        self.seen: list[_Seen] = []
        self.logits = torch.empty(0)

    def run_intact(self) -> None:
        """The pass that the others are compared with."""

        def handle(place: int, given: CallArguments) -> Tensor:
            output = given.compute()
            self.seen.append(_Seen(_rows(given, self.tokens), output))
            return output

        self.logits = self._forward(self.inputs, handle)
        self.intact = self.tokens_read

    def run_without_aside(self) -> None:
        """Refuse when attention that no gradient reaches looks at the images and decides about the logits."""
        key = image_key(self.inputs)
        if not self.aside or key is None:
            return
        entered: dict[bool, list[Tensor]] = {False: [], True: []}

        def watched(changed: bool) -> Callable[[CallArguments], Tensor]:
            def aside(given: CallArguments) -> Tensor:
                entered[changed].append(given.q)
                return given.compute()

            return aside

        def held(place: int, given: CallArguments) -> Tensor:
            return self.seen[place].output

        self._forward(self.inputs, held, watched(False))
        self._forward({**self.inputs, key: self.inputs[key].flip(-1) + 1}, held, watched(True))
        pairs = zip(entered[False], entered[True], strict=True)
        looking = iter([one.shape != other.shape or not torch.equal(one, other) for one, other in pairs])
        logits = self._forward(
            self.inputs,
            held,
            lambda given: torch.randn_like(given.compute()) if next(looking) else given.compute(),
        )
        if not torch.equal(logits, self.logits):
            raise CutOffError(under_no_grad(self.aside))

    def run_changed(self, chosen: Tensor, number: int) -> None:
        """Change some tokens at every layer; all others must arrive everywhere as before.

        Args:
            chosen: `(batch, tokens)`, True where attention outputs are replaced.
            number: Of this pass; picks the part of the images that is changed as well.
        """
        changed = chosen.clone()
        images = chosen.any(-1)
        inputs = part_changed(self.inputs, number, images)
        if inputs is not None:
            reached = self._reached_by(inputs)
            if reached.float().mean() * self.batch > _MOST_REACHED * images.sum():
                inputs = None
            else:
                changed |= reached

        def handle(place: int, given: CallArguments) -> Tensor:
            seen = self.seen[place]
            self._check_entering(
                place, _different_rows(_rows(given, self.tokens), seen.entering), changed, images
            )
            return seen.output if self.calls[place].is_pool else with_noise(seen.output, changed)

        logits = self._forward(self.inputs if inputs is None else inputs, handle)
        reads = self.tokens_read
        if logits.shape == self.logits.shape and logits.ndim:
            self._check_end(logits, reads, changed, images)

    def _check_entering(self, place: int, different: Tensor, changed: Tensor, images: Tensor) -> None:
        call = self.calls[place]
        if different[~images].any():
            raise UnsupportedModelError(_IMAGES_MIXED.format(where=f"at {_named(call)}"))
        if (different & ~changed).any():
            raise UnsupportedModelError(self._mixed(place))
        if call.depth > 0 and bool((changed & ~different & ~self.padded).any()) and not call.is_pool:
            raise UnsupportedModelError(self._replaced(place))

    def _check_end(self, logits: Tensor, reads: Tensor | None, changed: Tensor, images: Tensor) -> None:
        moved = _different_rows((logits.flatten(1)[:, None],), (self.logits.flatten(1)[:, None],))[:, 0]
        stays = self.read.any(-1) & ~(changed & self.read).any(-1)
        if (moved & (stays | ~images)).any():
            # A forward that draws or counts never gives the same logits twice: then they say nothing.
            again = self._forward(self.inputs, lambda place, given: self.seen[place].output)
            moved &= ~_different_rows((again.flatten(1)[:, None],), (self.logits.flatten(1)[:, None],))[:, 0]
        if moved[~images].any():
            raise UnsupportedModelError(_IMAGES_MIXED.format(where="after the last attention"))
        mixed = bool((moved & stays).any())
        if reads is not None and self.intact is not None:
            mixed |= bool((_different_rows((reads,), (self.intact,)) & ~changed & self.read).any())
        if mixed:
            raise UnsupportedModelError(self._mixed(len(self.calls)))

    def _reached_by(self, inputs: dict[str, Any]) -> Tensor:
        """`(batch, tokens)`, True where the first attention layer sees a difference."""
        found = torch.ones(self.batch, self.tokens, dtype=torch.bool)

        def handle(place: int, given: CallArguments) -> Tensor:
            if place == 0:
                found.copy_(_different_rows(_rows(given, self.tokens), self.seen[0].entering))
                raise _EnoughError
            return self.seen[place].output

        with suppress(_EnoughError):
            self._forward(inputs, handle)
        return found

    def _forward(
        self,
        inputs: dict[str, Any],
        handle: Callable[[int, CallArguments], Tensor],
        aside: Callable[[CallArguments], Tensor] = CallArguments.compute,
    ) -> Tensor:
        count, trace = itertools.count(), ModuleTrace()
        trace.tokens.wanted = self.read_place

        def numbered(given: CallArguments) -> Tensor:
            place = self.order.get(next(count))
            heads_first = place is not None and self.calls[place].heads_first
            given, restored = with_four_axes(given, self.batch, heads_first)
            trace.saw_call()
            if place is None:
                # Attention that the explained images do not reach goes on as it is.
                return restored(aside(given))
            output = handle(place, given)
            trace.saw_attention(len(output), output.shape[-2], given.k.shape[-2])
            return restored(output)

        # The same random stream in each pass: what a model draws at random is not what is asked here.
        with (
            torch.no_grad(),
            isolated_random_state(seed=0),
            intercept_attention(self.classifier, numbered, trace),
        ):
            # Copies, for a model may normalise its input in place.
            fresh = {key: v.clone() if isinstance(v, Tensor) else v for key, v in inputs.items()}
            logits = self.outcome(forward(self.classifier, fresh)).clone()
        kept = trace.tokens.kept
        self.tokens_read = None if kept is None else as_tokens(kept, self.batch, self.tokens)
        return logits

    def _mixed(self, place: int) -> str:
        before = f"{_named(self.calls[place - 1])}" if place else "the patches"
        after = _named(self.calls[place]) if place < len(self.calls) else "the classifier"
        return (
            f"tokens are mixed outside the attention, between {before} and {after}: a token there changes when "
            "another one does (a convolution, recurrence, gate, normalisation or permutation over tokens, or "
            "attention that does not pass scaled_dot_product_attention), which a rollout of attention maps alone "
            "would miss."
        )

    def _replaced(self, place: int) -> str:
        return (
            f"tokens that {_named(self.calls[place])} reads do not come from the layer before it, "
            f"{_named(self.calls[place - 1])}: they were replaced on the way (deep prompt tokens), so a rollout "
            "would lead through them where nothing passes."
        )


_IMAGES_MIXED = (
    "an image's tokens or logits depend on the other images of its batch ({where}: batch statistics, in-batch "
    "similarity, routing with a capacity): an explanation would not be that of the image alone. Explain one image at "
    "a time with micro_batch_size=1, or use running statistics in evaluation."
)


class _EnoughError(Exception):
    """Ends a forward pass of which the beginning was wanted."""


def _rows(given: CallArguments, tokens: int) -> tuple[Tensor, ...]:
    """Queries, keys and values as `(batch, tokens, features)`; a pool's query is no token."""
    # What a map computed by hand was made of is not at hand: its rows depend on all tokens, its values on their own.
    entering = (given.q, given.k, given.v) if given.written is None else (given.v,)
    parts = [part for part in entering if part.ndim == 4 and part.shape[-2] == tokens]
    return tuple(part.transpose(1, 2).flatten(2) for part in parts)


def _different_rows(now: Sequence[Tensor], before: Sequence[Tensor]) -> Tensor:
    """`(batch, rows)` on the CPU, True where any of the tensors `(batch, rows, features)` differs."""
    different = []
    for one, other in zip(now, before, strict=True):
        gap = (one - other).abs().nan_to_num(0.0).amax(-1).double()
        different.append((gap > _SAME * other.abs().nan_to_num(0.0).max().double()).cpu())
    return torch.stack(different).any(0)


def _named(call: AttentionCall) -> str:
    return f"{call.name} ({call.owner})"
