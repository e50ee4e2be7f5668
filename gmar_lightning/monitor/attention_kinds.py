"""The ways in which attention, values and tokens degenerate while the gradient lives on, as one table.

Sources: entropy collapse, arXiv 2303.06296; growing logits, arXiv 2507.20534 (clipped there at 100); sinks,
arXiv 2606.08105; idle heads, arXiv 2504.03889; rank collapse, arXiv 2103.03404.
"""

from __future__ import annotations

from dataclasses import dataclass

from gmar_lightning.monitor.events import EventKind


@dataclass(frozen=True)
class Rule:
    """One way to degenerate.

    Attributes:
        kind: Event that reports it.
        end: Event that takes it back.
        signal: The signal shown to people.
        margin: Its distance from the degenerate state, a name of `causes.margins`.
        near: Next to nothing: the margin below which a head can be reported.
        kept: The fraction of its own held margin below which it can be.
        beside: The fraction of the layer's typical held margin below which it can be.
        had: The margin that a head must once have held to have lost it.
        what: What happened, for a person; `{now}` and `{before}` are the signal.
        advice: What it means and what to do.
        unless: Margins, with their limits, that explain the same finding better.
        whole_layer: One value per layer, repeated over heads.
    """

    kind: EventKind
    end: EventKind
    signal: str
    margin: str
    near: float
    kept: float
    beside: float
    had: float
    what: str
    advice: str
    unless: tuple[tuple[str, float], ...] = ()
    whole_layer: bool = False


# A sink that takes nearly all mass is one-token attention too, and is reported as the sink it is.
_SINK, _UNIFORM, _ONE_TOKEN = 0.1, 0.002, 0.15

RULES = (
    Rule(
        "entropy_collapse",
        "entropy_restored",
        "entropy",
        "spread",
        near=_ONE_TOKEN,
        kept=0.25,
        beside=0.5,
        had=0.0,
        what="attends to one token only: its entropy went from {before:.2f} to {now:.3f} (1 is uniform)",
        advice="training with collapsed entropy tends to diverge; lower the learning rate, warm up longer or "
        "normalise queries and keys (QK-norm)",
        unless=(("outside sink", _SINK),),
    ),
    Rule(
        "uniform_attention",
        "uniform_attention_end",
        "entropy",
        "focus",
        near=_UNIFORM,
        kept=0.005,
        beside=0.02,
        had=5e-5,
        what="attends to everything alike: its entropy went from {before:.4f} to {now:.5f} (1 is uniform)",
        advice="it averages the tokens and chooses none; look for queries or keys driven to zero (weight decay "
        "on them, a frozen or reset projection)",
        # tokens that are alike are attended to alike
        unless=(("token difference", 0.2),),
    ),
    Rule(
        "logit_growth",
        "logit_growth_end",
        "logit_max",
        "calm",
        near=1 / 30,
        kept=0.2,
        beside=0.4,
        had=0.0,
        what="has attention logits that keep growing: the largest went from {before:.1f} to {now:.0f}",
        advice="beyond about 100 half precision and the softmax saturate; clip or normalise queries and keys "
        "(QK-norm, QK-clip) or lower the learning rate",
    ),
    Rule(
        "attention_sink",
        "attention_sink_end",
        "sink_mass",
        "outside sink",
        near=_SINK,
        kept=0.25,
        beside=0.5,
        had=0.0,
        what="gives nearly all of its attention to one token: that token's share went from {before:.2f} to "
        "{now:.3f}",
        advice="whatever the query asks, it reads the same token; if that token's value is small the head does "
        "nothing (register tokens or a gate on the output give it another way to rest)",
    ),
    Rule(
        "head_copy",
        "head_copy_end",
        "similarity",
        "difference",
        near=0.02,
        kept=0.1,
        beside=0.2,
        had=0.0,
        what="became a copy of another head of its layer: cosine of the two went from {before:.2f} to {now:.4f}",
        advice="one of the two is redundant and can be pruned, or set anew to be of use",
        # heads that are given the same tokens return the same
        unless=(("token difference", 0.2),),
    ),
    Rule(
        "rank_collapse",
        "rank_restored",
        "token_similarity",
        "token difference",
        near=0.1,
        kept=0.2,
        beside=0.2,
        had=0.0,
        what="receives tokens that became alike: their mean cosine went from {before:.2f} to {now:.3f}",
        advice="nothing is left for attention to tell apart, here and in the layers after it; check residual "
        "connections, normalisation and LayerScale of the blocks before it",
        whole_layer=True,
    ),
    Rule(
        "constant_values",
        "constant_values_end",
        "value_similarity",
        "value difference",
        near=0.02,
        kept=0.1,
        beside=0.2,
        had=0.0,
        what="has the same value for every token: their mean cosine went from {before:.2f} to {now:.4f}",
        advice="whatever it attends to, it returns the same; look at its value projection (weights at zero "
        "beside a bias)",
        unless=(("token difference", 0.1),),
    ),
)
