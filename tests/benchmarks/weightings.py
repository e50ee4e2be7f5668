"""Other head and layer weightings within the idea of GMAR, tried against plain rollout.

    python -m tests.benchmarks.weightings --model vit_small_patch14_dinov2.lvd142m --weights FILE \
        --images DIR --size 140 [--only NAME ...]

Arguments as for `tests.benchmarks.faithfulness`. `A` is a head's attention map, `G` the gradient of the logit at it;
a weighting turns them into one score per head (or per head and query), and unless said otherwise the maps are rolled
out last to first with row sums of one, as `rollout="flow"`. For class-token models of timm. Prints the paired
differences to plain rollout.
"""

import argparse

import torch
from torch import Tensor

from gmar_lightning.explain.attention import record_attention
from gmar_lightning.explain.isolation import undisturbed
from tests.benchmarks.faithfulness import add_model_arguments, prepared
from tests.benchmarks.scoring import METHODS, collect, method_maps, score, table

PLAIN = "rollout (flow, uniform)"
BESIDE = (PLAIN, "GMAR paper L1", "gradient-gated uniform (Chefer 2021)")


class Layer:
    """What one layer offers: `A`, `G` as `(batch, heads, queries, keys)`, and its shares of the residual stream."""

    def __init__(self, attention: Tensor, gradient: Tensor, branch: Tensor, stream: Tensor) -> None:
        self.A, self.G, self.GA = attention, gradient, gradient * attention
        self.branch, self.stream = branch, stream

    def by_heads(self, scores: Tensor) -> Tensor:
        """The head-weighted map, `(batch, queries, keys)`; scores `(batch, heads)` or with queries."""
        scores = scores if scores.ndim == 3 else scores[:, :, None]
        total = scores.sum(1, keepdim=True)
        share = torch.where(total > 0, scores / total.clamp_min(1e-30), 1 / scores.shape[1])
        return (share[..., None] * self.A).sum(1)


HEAD_SCORES = {
    "sum(G A)+: evidence for the class": lambda layer: layer.GA.sum((-2, -1)).clamp_min(0),
    "|sum G A|": lambda layer: layer.GA.sum((-2, -1)).abs(),
    "sum G+": lambda layer: layer.G.clamp_min(0).sum((-2, -1)),
    "sum (G A)+": lambda layer: layer.GA.clamp_min(0).sum((-2, -1)),
    "readout row: sum |G|": lambda layer: layer.G[:, :, 0].abs().sum(-1),
    "readout row: sum (G A)+": lambda layer: layer.GA[:, :, 0].clamp_min(0).sum(-1),
    "each query its own heads: (sum_j G A)+": lambda layer: layer.GA.sum(-1).clamp_min(0),
}


def layers_of(model, images, targets):
    """One `Layer` per block, first to last, by plain autograd."""
    streams = []
    handles = [
        block.register_forward_pre_hook(lambda _, args: streams.append(args[0].requires_grad_()))
        for block in model.blocks
    ]
    with undisturbed(model), record_attention(model) as calls:
        logits = model(images)
        for handle in handles:
            handle.remove()
        outputs = [call.output for call in calls]
        grads = torch.autograd.grad(logits.gather(1, targets[:, None]).sum(), outputs + streams)
    found = []
    for call, stream, grad, at_stream in zip(calls, streams, grads, grads[len(calls) :], strict=False):
        branch = (grad * call.output.detach()).abs().sum((-3, -2, -1))
        found.append(
            Layer(
                call.attention(),
                grad @ call.per_head("v").mT,
                branch,
                (at_stream * stream.detach()).abs().sum((-2, -1)),
            )
        )
    return found


def flow(layers, maps, strengths=None):
    """Roll out last to first with row sums of one; a strength `(batch,)` scales what a layer adds."""
    row = torch.zeros_like(maps[0][:, 0])
    row[:, 0] = 1
    for index in reversed(range(len(layers))):
        added = (row[:, None] @ maps[index])[:, 0]
        row = row + (added if strengths is None else strengths[index][:, None] * added)
        row = row / row.sum(-1, keepdim=True)
    return row


def gated_rows(layers):
    """`r <- r + r sum_h (sum_j G A)+ A_h`: each query gates each head, and attention spreads what passes."""
    row = torch.zeros_like(layers[0].A[:, 0, 0])
    row[:, 0] = 1
    for layer in reversed(layers):
        gates = layer.GA.sum(-1).clamp_min(0)
        row = row + (row[:, None] @ (gates[..., None] * layer.A).sum(1))[:, 0]
    return row


def rows(model, images, targets):
    """Relevance of every token under every weighting, `(batch, tokens)` by name."""
    layers = layers_of(model, images, targets)
    found = {
        f"heads by {name}": flow(layers, [layer.by_heads(f(layer)) for layer in layers])
        for name, f in HEAD_SCORES.items()
    }
    l1 = [layer.G.abs().sum((-2, -1)) for layer in layers]
    maps = [layer.by_heads(scores) for layer, scores in zip(layers, l1, strict=True)]
    raw = torch.stack([scores.sum(-1) for scores in l1])
    found["GMAR L1, layers scaled by raw importance"] = flow(layers, maps, raw / raw.mean(0))
    positive = torch.stack([layer.GA.clamp_min(0).sum((-3, -2, -1)) for layer in layers])
    found["GMAR L1, layers scaled by sum (G A)+"] = flow(layers, maps, positive / positive.mean(0))
    ratio = torch.stack([layer.branch / layer.stream for layer in layers])
    found["GMAR L1, residual from the gradient ratio"] = flow(layers, maps, ratio)
    signed = [layer.by_heads(layer.GA.sum(-1).clamp_min(0)) for layer in layers]
    found["each query its own heads, layers scaled by sum (G A)+"] = flow(
        layers, signed, positive / positive.mean(0)
    )
    found["each query gates each head, not normalised"] = gated_rows(layers)
    return found


def weighting_maps(model, images, targets):
    """Heatmaps of every weighting, beside plain rollout, the paper's form and the gradient-gated one."""
    beside = method_maps(model, images, targets, {name: METHODS[name] for name in BESIDE})
    height, width = beside[PLAIN].shape[1:]
    drawn = {
        name: row[:, -height * width :].unflatten(1, (height, width))
        for name, row in rows(model, images, targets).items()
    }
    return {name: beside[name] for name in BESIDE} | drawn


def main():
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_model_arguments(parse)
    parse.add_argument("--steps", type=int, default=4, help="0: by masks alone")
    parse.add_argument("--only", nargs="*", help="these weightings only")
    args = parse.parse_args()
    model, images, _, masks, _ = prepared(args)
    scores = {}
    for start in range(0, len(images), args.batch):
        x, part = (
            images[start : start + args.batch],
            masks[start : start + args.batch] if masks is not None else None,
        )
        with torch.no_grad():
            targets = model(x).argmax(-1)
        maps = weighting_maps(model, x, targets)
        if args.only is not None:
            maps = {name: drawn for name, drawn in maps.items() if name == PLAIN or name in args.only}
        collect(
            scores, score(model, x, targets, maps, steps=args.steps, groups=0, attention=False, masks=part)
        )
    print(f"{args.model} at {args.size} px, {len(images)} validation images\n")
    print(table(scores))
    print("\nPaired difference to plain rollout:\n")
    print(table(scores, against=PLAIN))


if __name__ == "__main__":
    main()
