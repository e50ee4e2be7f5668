"""Every name that is logged, and what it means: read by dashboard, loggers, workspace and the documentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from gmar_lightning.explain.rollout import Rollout
from gmar_lightning.monitor.record import Source

# W&B's x-axis, under the name that Lightning's own WandbLogger gives it.
STEP = "trainer/global_step"


@dataclass(frozen=True)
class Key:
    """What stands behind a logged name.

    Attributes:
        meaning: One phrase.
        kind: "number" and "layer number" and "head number" go to every logger; "pictures" (a list; "other pictures"
            on request), "picture",
            "histogram", "table" (at the end; a "growing table" has new rows at each probe) and "page" to those
            that can show them; "summary" is one value per run.
    """

    meaning: str
    kind: Literal[
        "number",
        "layer number",
        "head number",
        "pictures",
        "other pictures",
        "picture",
        "head picture",
        "histogram",
        "growing table",
        "table",
        "page",
        "summary",
    ] = "number"


HEATMAPS, INPUTS = "gmar/heatmaps", "gmar/inputs"
HEAD_IMPORTANCE, HEAD_EVOLUTION = "gmar/head_importance", "gmar/head_evolution"
IMPORTANCE_HISTOGRAM = "gmar/importance"
HEAD_TABLE, REPORT = "gmar/head_table", "gmar/report"
EVENTS, IMAGES = "gmar/events", "gmar/images"
COLLAPSED, NEWLY_COLLAPSED = "gmar/collapsed_heads", "gmar/newly_collapsed"
EFFECTIVE_HEADS, IMPORTANCE_MIN = "gmar/effective_heads", "gmar/importance_min"
ENTROPY = "gmar/attention_entropy"
DRIFT, DRIFT_FROM_FIRST = "gmar/heatmap_drift", "gmar/heatmap_drift_from_first"
SECONDS = "gmar/compute_seconds"
FAITHFULNESS_PREFIX = "gmar/faithfulness_"
CLASS_SENSITIVITY, RANDOMISATION = "gmar/class_sensitivity", "gmar/randomisation"
HEAD_CONTRIBUTION, CONTRIBUTION_EVOLUTION = "gmar/head_contribution", "gmar/head_contribution_evolution"
COLLAPSED_FINAL, COLLAPSED_EVER = "gmar/collapsed_final", "gmar/collapsed_ever"
FIRST_COLLAPSE, WORST_HEAD = "gmar/first_collapse_step", "gmar/worst_head"
WORST_SHARE, DRIFT_FROM_PRETRAINED = "gmar/worst_head_share", "gmar/drift_from_pretrained"
FAITHFULNESS = "gmar/faithfulness"

# `{layer}` and `{head}` stand for two digits.
LAYER_EFFECTIVE_HEADS = "gmar_layers/effective_heads_L{layer:02d}"
LAYER_IMPORTANCE = "gmar_layers/importance_L{layer:02d}"
LAYER_ENTROPY = "gmar_layers/entropy_L{layer:02d}"
HEAD_SHARE = "gmar_heads/L{layer:02d}_H{head:02d}"
FLAGGED_HEAD = "gmar_flagged/L{layer:02d}_H{head:02d}"

KEYS: Mapping[str, Key] = {
    HEATMAPS: Key("the drawn probe images under their maps, in a fixed order", "pictures"),
    INPUTS: Key("the same photographs without heat, once", "pictures"),
    **{
        f"{HEATMAPS}_{form}": Key(
            f'the same under the map of rollout="{form}"; with log_rollouts', "other pictures"
        )
        for form in get_args(Rollout)
    },
    HEAD_IMPORTANCE: Key("layers x heads on a fixed scale, flagged heads crossed", "picture"),
    HEAD_EVOLUTION: Key("every head over the whole run; a head that dies leaves a dark streak", "picture"),
    HEAD_CONTRIBUTION: Key("layers x heads by contribution to the score, flagged heads crossed", "picture"),
    CONTRIBUTION_EVOLUTION: Key("contribution of every head over the whole run", "picture"),
    IMPORTANCE_HISTOGRAM: Key("all shares in fair shares, fixed range", "histogram"),
    COLLAPSED: Key("heads flagged now"),
    NEWLY_COLLAPSED: Key("heads flagged by this probe"),
    EFFECTIVE_HEADS: Key("how many heads share a layer's importance, mean over layers"),
    IMPORTANCE_MIN: Key("share of the weakest head; 1 is fair"),
    ENTROPY: Key("1 is uniform attention, 0 is attention to one token"),
    DRIFT: Key("1 - rank correlation with the maps of the probe before"),
    DRIFT_FROM_FIRST: Key("1 - rank correlation with the maps of the first probe"),
    SECONDS: Key("what the probe took"),
    LAYER_EFFECTIVE_HEADS: Key("how many heads share the layer's importance", "layer number"),
    LAYER_IMPORTANCE: Key("raw importance of all heads of the layer", "layer number"),
    LAYER_ENTROPY: Key("attention entropy, mean over the heads of the layer", "layer number"),
    FLAGGED_HEAD: Key(
        "a newly flagged head: what it attends to before, now, and a healthy one beside it", "head picture"
    ),
    HEAD_SHARE: Key("share in fair shares; with log_per_head=True", "head number"),
    f"{FAITHFULNESS_PREFIX}insertion_minus_deletion": Key(
        "insertion - deletion of the maps; higher is better"
    ),
    f"{FAITHFULNESS_PREFIX}insertion_minus_deletion_random": Key("the same of random maps"),
    f"{FAITHFULNESS_PREFIX}insertion_minus_deletion_rollout": Key("the same of plain attention rollout"),
    f"{FAITHFULNESS_PREFIX}average_drop": Key("average drop of the maps; lower is better"),
    f"{FAITHFULNESS_PREFIX}average_drop_random": Key("the same of random maps"),
    f"{FAITHFULNESS_PREFIX}average_drop_rollout": Key("the same of plain attention rollout"),
    CLASS_SENSITIVITY: Key(
        "rank correlation of the maps with those of the runner-up class; 1 is class-blind"
    ),
    RANDOMISATION: Key("rank correlation with the maps of the top block's weights shuffled; low is healthy"),
    EVENTS: Key("a row per event", "growing table"),
    IMAGES: Key("a row per drawn image and probe", "growing table"),
    HEAD_TABLE: Key("every head at every probe, at the end", "table"),
    REPORT: Key("the interactive report, at the end", "page"),
    COLLAPSED_FINAL: Key("heads flagged at the end", "summary"),
    COLLAPSED_EVER: Key("heads flagged at any time", "summary"),
    FIRST_COLLAPSE: Key("step of the first flag", "summary"),
    WORST_HEAD: Key("the head with the smallest share at the end", "summary"),
    WORST_SHARE: Key("its share; 1 is fair", "summary"),
    DRIFT_FROM_PRETRAINED: Key(
        "1 - rank correlation of the last maps with those before the first optimizer step", "summary"
    ),
    FAITHFULNESS: Key("insertion - deletion of the maps when it was last measured", "summary"),
}


def of_source(name: str, source: Source) -> str:
    """The name under which a record of this source logs: `gmar_step/...` for what is read off training steps."""
    return name if source == "probe" else name.replace("gmar", "gmar_step", 1)


def under(path: str | None, name: str) -> str:
    """A name as it is logged for one of several modules: `gmar/<path>/...`; unchanged without a path."""
    family, _, rest = name.partition("/")
    return "/".join(part for part in (family, path, rest) if part)


def test_of_maps(name: str) -> str:
    """The logged name of one of the numbers in `ProbeRecord.faithfulness`."""
    others = {"class_sensitivity": CLASS_SENSITIVITY, "randomisation": RANDOMISATION}
    return others.get(name, f"{FAITHFULNESS_PREFIX}{name}")


def of_kind(*kinds: str) -> list[str]:
    """The names of these kinds, in the table's order."""
    return [name for name, key in KEYS.items() if key.kind in kinds]


def head_names(heads: Sequence[int]) -> list[tuple[str, tuple[int, int]]]:
    """The name of every head's number, with its `(layer, head)`; `heads` says how many each layer has."""
    return [
        (HEAD_SHARE.format(layer=layer, head=head), (layer, head))
        for layer, count in enumerate(heads)
        for head in range(count)
    ]


def any_layer(name: str) -> str:
    """A regular expression for the names that a name with `{layer}` stands for, as W&B's panels take it."""
    return name.split("L{")[0] + ".*"
