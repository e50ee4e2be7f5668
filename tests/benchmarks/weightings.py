"""Other head and layer weightings within the idea of GMAR, tried against plain rollout.

    python -m tests.benchmarks.weightings --model vit_small_patch14_dinov2.lvd142m --weights FILE \
        --images DIR --size 140 [--only NAME ...]

Arguments as for `tests.benchmarks.faithfulness`. `A` is a head's attention map, `G` the gradient of the logit at it;
a weighting turns them into one score per head (or per head and query), and unless said otherwise the maps are rolled
out last to first with row sums of one, as `rollout="flow"`. Names that begin with "gated" are variants of the
default, `rollout="gradient"`. For class-token models of timm. Prints the paired differences to plain rollout and to
the default: a variant is worth offering when it beats the default by two standard errors on two models.
"""

import argparse

import torch
from torch import Tensor

from gmar_lightning.explain.attention import record_attention
from gmar_lightning.explain.isolation import undisturbed
from tests.benchmarks.faithfulness import add_model_arguments, prepared
from tests.benchmarks.scoring import METHODS, collect, method_maps, score, table

PLAIN = "rollout (flow, uniform)"
DEFAULT = "gradient-gated GMAR L1"
BESIDE = (PLAIN, "GMAR paper L1", "gradient-gated uniform (Chefer 2021)", DEFAULT)


class Layer:
    """What one layer offers: `A`, `G` as `(batch, heads, queries, keys)`, and its shares of the residual stream."""

    def __init__(self, attention: Tensor, gradient: Tensor, at_output: Tensor, at_stream: Tensor) -> None:
        self.A, self.G, self.GA = attention, gradient, gradient * attention
        # `dO * O` as `(batch, heads, queries, value_dim)`, and `dx * x` of what enters as `(batch, tokens, dim)`
        self.at_output, self.at_stream = at_output, at_stream
        self.branch = at_output.abs().sum((-3, -2, -1))
        self.stream = at_stream.abs().sum((-2, -1))

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
        # Inside the block: what the hooks collected is put back with the rest of the model.
        found = []
        for call, stream, grad, at_stream in zip(calls, streams, grads, grads[len(calls) :], strict=False):
            gradient = grad @ call.per_head("v").mT
            outputs = grad * call.output.detach()
            found.append(Layer(call.attention(), gradient, outputs, at_stream * stream.detach()))
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


def shares_of(scores):
    """Scores `(batch, heads)` as shares of the layer."""
    return scores / scores.sum(-1, keepdim=True).clamp_min(1e-30)


def gated(layers, heads=None, tokens=None, queries=None, strengths=None):
    """The default recursion `r <- r + r sum_h w_h (G A)+`, with parts of it exchanged.

    Args:
        heads: Scores of a layer's heads, `(batch, heads)`; the L1 norm of `G` when None.
        tokens: Factor of each attended token of a layer, `(batch, tokens)`.
        queries: Factor of each attending token of a layer, `(batch, tokens)`.
        strengths: What a layer adds beside the residual path, `(layers, batch)`.
    """
    row = torch.zeros_like(layers[0].A[:, 0, 0])
    row[:, 0] = 1
    for index, layer in reversed(list(enumerate(layers))):
        scores = layer.G.abs().sum((-2, -1)) if heads is None else heads(layer)
        weighted = (shares_of(scores)[:, :, None, None] * layer.GA.clamp_min(0)).sum(1)
        asking = row if queries is None else row * queries(layer)
        added = (asking[:, None] @ weighted)[:, 0]
        added = added if tokens is None else added * tokens(layer)
        row = row + (added if strengths is None else strengths[index][:, None] * added)
    return row


def around_one(values):
    """Values `(batch, tokens)` divided by their mean over the tokens."""
    return values / values.mean(-1, keepdim=True).clamp_min(1e-30)


def gated_variants(layers):
    """Variants of the default."""
    ratio = torch.stack([layer.branch / layer.stream for layer in layers])
    return {
        "gated, heads by |sum dO O|": gated(layers, heads=lambda layer: layer.at_output.sum((-2, -1)).abs()),
        "gated, heads by (sum dO O)+": gated(
            layers, heads=lambda layer: layer.at_output.sum((-2, -1)).clamp_min(0)
        ),
        # The idea of a gradient prior over tokens (arXiv 2604.18094) in each transition.
        "gated, tokens by |dx x|": gated(
            layers, tokens=lambda layer: around_one(layer.at_stream.norm(dim=-1))
        ),
        "gated, residual from the gradient ratio": gated(layers, strengths=ratio / ratio.mean(0)),
        "gated, queries by |dO O|": gated(
            layers, queries=lambda layer: around_one(layer.at_output.square().sum((1, 3)).sqrt())
        ),
    }


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
    return found | gated_variants(layers)


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
            maps = {
                name: drawn for name, drawn in maps.items() if name in (PLAIN, DEFAULT) or name in args.only
            }
        collect(
            scores, score(model, x, targets, maps, steps=args.steps, groups=0, attention=False, masks=part)
        )
    print(f"{args.model} at {args.size} px, {len(images)} validation images\n")
    print(table(scores))
    for other in (PLAIN, DEFAULT):
        print(f"\nPaired difference to {other}:\n")
        print(table(scores, against=other))


if __name__ == "__main__":
    main()
