"""From the last attention layer to the first: every number of a layer is taken in one visit to its map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gmar_lightning.explain.attention import AttentionCall
from gmar_lightning.explain.blocks import Block
from gmar_lightning.explain.importance import (
    Norm,
    absolute_sum,
    equal_weights,
    gram_norm,
    head_contribution,
    head_weights,
)
from gmar_lightning.explain.kernel import NO_GRADS, Needs, span_of, visit_blocks
from gmar_lightning.explain.rollout import BackwardRows, PaperStep, Rollout, paper_row
from gmar_lightning.explain.signals import DistanceTable, MapSignals
from gmar_lightning.explain.tokens import TokenLayout

HeadMaps = Literal["plain"] | bool


@dataclass(frozen=True)
class Form:
    """What is asked of an explanation, in the words of `gmar`; `rollouts` are the forms, the first one first."""

    norm: Norm = "l1"
    rollouts: tuple[Rollout, ...] = ("gradient",)
    residual: float = 1.0
    signals: bool = False
    head_maps: HeadMaps = False
    runner_up: bool = False


@dataclass(frozen=True, eq=False)
class LayerNumbers:
    """What one layer showed, per image and head.

    Attributes:
        importance: `(batch, heads)`, norm of the gradient at the map.
        weights: `(batch, heads)`, under the norm that was asked for.
        contribution: `(batch, heads)`, `sum dO * O`, signed.
        pulled: For each row by name, `row @ A_h` (or the gated map), `(batch, heads, keys)`.
        signals: `(batch, heads)` each; empty unless asked for.
    """

    importance: Tensor
    weights: Tensor
    contribution: Tensor
    pulled: Mapping[str, Tensor]
    signals: Mapping[str, Tensor]


class Sweep:
    """Takes the layers of one forward pass in from the last to the first.

    The rows of all forms and the readout of the head maps are pulled through a layer together, per head; the
    head weights, known when the layer's last block is, are put to the results. So the map and its gradient are
    visited once, whatever was asked for.

    Args:
        calls: All attention calls, in forward order.
        readout: The row that the classifier reads, `(batch, tokens)`, over the query of a final pool if there is one.
        form: What is asked for.
        layout: Where the patches are.
        padding: Optional `(batch, tokens)`, 0 at padding.
    """

    def __init__(
        self,
        calls: Sequence[AttentionCall],
        readout: Tensor,
        form: Form,
        layout: TokenLayout,
        padding: Tensor | None,
    ) -> None:
        self.calls, self.form, self.layout, self.padding = calls, form, layout, padding
        self.readout = readout.to(torch.promote_types(calls[-1].q.dtype, torch.float32))
        self.layers: dict[int, LayerNumbers] = {}
        self.head_maps: dict[int, Tensor] = {}
        self._kept: dict[int, Tensor] = {}
        self._far = DistanceTable(layout)
        self._started = not calls[-1].is_pool
        self.start_at(self.readout)

    def start_at(self, readout: Tensor) -> None:
        """Start from another readout row; before any layer was taken."""
        self.readout = readout
        self._start: dict[str, Tensor] = dict.fromkeys(self.form.rollouts, readout)
        self._rows = BackwardRows(self.form.rollouts, self._start, self.form.residual)

    def take(
        self,
        index: int,
        output_grad: Tensor,
        kept: Tensor | None = None,
        peak: Tensor | None = None,
        needs: Needs = NO_GRADS,
    ) -> tuple[Tensor | None, ...]:
        """Visit the layer at `index`, given `dy/dO`; layers come in backward order.

        Args:
            index: Which of the calls.
            output_grad: `dy/dO`, `(batch, heads, queries, value_dim)`.
            kept: The map, where the forward kept it.
            peak: Largest pre-softmax logit, `(batch, heads)`, where the map was kept.
            needs: Which gradients at q, k, v and the mask autograd wants.

        Returns:
            Those gradients.
        """
        call = self.calls[index]
        rows = self._rows.at(call.depth) if self._started else {"start": self.readout}
        gated = {"gradient": rows.pop("gradient")} if "gradient" in rows else {}
        if self.form.head_maps:
            (rows if self.form.head_maps == "plain" else gated)["head map"] = self._head_row()
        sums = LayerSums(call, rows, gated, self.form, self._far, self.padding, peak)
        # Past the last attention only the rows that are read have a gradient: for a class token, one of them.
        span = span_of(output_grad) if call.depth == self.calls[-1].depth else slice(None)
        grads = visit_blocks(call, output_grad, kept, sums, needs, span)
        numbers = self.layers[index] = sums.results(call, output_grad)
        # The paper's form runs from the first layer to the last, so it waits until all weights are known.
        if kept is not None and "paper" in self.form.rollouts:
            self._kept[index] = kept
        pulled = dict(numbers.pulled)
        if self.form.head_maps:
            self.head_maps[index] = pulled.pop("head map")
        if not self._started:
            self._start_from_pool(numbers, pulled["start"])
            return grads
        self._rows.take({form: _weighted(self._weights(form, numbers), row) for form, row in pulled.items()})
        return grads

    def maps(self) -> dict[str, Tensor]:
        """The final row of every form, `(batch, tokens)`, once every layer was taken."""
        rows = self._rows.close()
        if "paper" in self.form.rollouts:
            rows = {**rows, "paper": paper_row(self._start["paper"], self._depths(), self.form.residual)}
        return {form: rows[form] for form in self.form.rollouts}

    def _start_from_pool(self, numbers: LayerNumbers, row: Tensor) -> None:
        # An attention pool reads the tokens through its own head-weighted row: rollouts start there.
        self._start = {form: _weighted(self._weights(form, numbers), row) for form in self.form.rollouts}
        # Before a pool, a head is asked what it attends to on behalf of what the pool reads.
        self._start["head map"] = _weighted(numbers.weights, row)
        self._rows = BackwardRows(self.form.rollouts, self._start, self.form.residual)
        self._started = True

    def _head_row(self) -> Tensor:
        return self._start.get("head map", self.readout)

    def _depths(self) -> list[list[PaperStep]]:
        depths: dict[int, list[PaperStep]] = {}
        for index, call in enumerate(self.calls):
            if not call.is_pool:
                depths.setdefault(call.depth, []).append(
                    (call, self.layers[index].weights, self._kept.get(index))
                )
        return list(depths.values())

    @staticmethod
    def _weights(form: str, numbers: LayerNumbers) -> Tensor:
        return equal_weights(numbers.importance) if form == "rollout" else numbers.weights


def visit(call: AttentionCall, output_grad: Tensor, form: Form, layout: TokenLayout) -> LayerNumbers:
    """The numbers of a layer that belongs to no rollout.

    Args:
        call: The layer.
        output_grad: `dy/dO`, `(batch, heads, queries, value_dim)`.
        form: What is asked for.
        layout: Where the patches are.
    """
    sums = LayerSums(call, {}, {}, form, DistanceTable(layout), None)
    visit_blocks(call, output_grad, None, sums, NO_GRADS)
    return sums.results(call, output_grad)


class LayerSums:
    """What is added up over the blocks of one layer."""

    def __init__(
        self,
        call: AttentionCall,
        plain: Mapping[str, Tensor],
        gated: Mapping[str, Tensor],
        form: Form,
        far: DistanceTable,
        padding: Tensor | None,
        peak: Tensor | None = None,
    ) -> None:
        batch, heads, _, _ = call.q.shape
        dtype = torch.promote_types(call.q.dtype, torch.float32)
        self.norm, self.padding = form.norm, padding
        self.signals = MapSignals(call, far.layout, padding, peak, far) if form.signals else None
        if self.signals is not None:
            plain = {**plain, "mean": self.signals.share}
        self.importance = call.q.new_zeros(batch, heads, dtype=dtype)
        self.plain, self.gated = (
            _Pulled(rows, heads, call.k.shape[-2], dtype) if rows else None for rows in (plain, gated)
        )
        self.needs_map = bool(plain or gated)
        # The L2 norm comes from two Gram matrices; then the map's gradient is formed for nobody.
        self.needs_grad = form.norm != "l2" or bool(gated)

    def saw_map(self, block: Block, scores: Tensor | None, attention: Tensor) -> None:
        """Take in a block of the map and its pre-softmax scores."""
        if self.plain is not None:
            self.plain.add(block, attention)
        if self.signals is not None:
            self.signals.add(block, scores, attention)

    def saw_gradient(self, block: Block, attention: Tensor | None, grad: Tensor) -> None:
        """Take in a block of the gradient at the map, and of the map."""
        if self.norm != "l2":
            self.importance[block.images, block.heads] += absolute_sum(block, grad, self.padding)
        if self.gated is not None and attention is not None:
            self.gated.add(block, (attention * grad).clamp_min_(0))

    def results(self, call: AttentionCall, output_grad: Tensor) -> LayerNumbers:
        """The layer's numbers, once every block was taken in."""
        if self.norm == "l2":
            self.importance = gram_norm(call, output_grad, self.padding)
        weigh = equal_weights if self.norm == "uniform" else head_weights
        pulled = {
            **(self.plain.by_name() if self.plain else {}),
            **(self.gated.by_name() if self.gated else {}),
        }
        signals = {}
        if self.signals is not None:
            signals = self.signals.results(call, output_grad, pulled.pop("mean"))
        return LayerNumbers(
            importance=self.importance,
            weights=weigh(self.importance),
            contribution=head_contribution(call, output_grad),
            pulled=pulled,
            signals=signals,
        )


class _Pulled:
    """Several rows times every head's map, `(batch, heads, rows, keys)`, added up over blocks of queries."""

    def __init__(self, rows: Mapping[str, Tensor], heads: int, keys: int, dtype: torch.dtype) -> None:
        self.names, self.rows = tuple(rows), torch.stack([row.to(dtype) for row in rows.values()], 1)
        self.total = self.rows.new_zeros(len(self.rows), heads, len(self.names), keys)

    def add(self, block: Block, weights: Tensor) -> None:
        rows = self.rows[block.images, None, :, block.rows]
        self.total[block.images, block.heads] += rows @ weights

    def by_name(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.total.unbind(2), strict=True))


def _weighted(weights: Tensor, per_head: Tensor) -> Tensor:
    return (weights[:, :, None] * per_head).sum(1)
