"""Heads in the order in which they could be pruned, by what they contribute to the answer."""

from __future__ import annotations

import numpy as np

from gmar_lightning.monitor.history import History

# One probe's contribution is noisy where the model still moves; the mean of the last three is what is ranked.
_PROBES = 3


def mean_contribution(history: History) -> np.ndarray:
    """Contribution of each head, mean of the last three probes that have it, `(layers, heads)`.

    Raises:
        ValueError: No probe of the record has contributions (records of format 1).
    """
    known = [record for record in history.records if "contribution" in record.signals]
    if not known:
        raise ValueError(f"the record in {history.dir} keeps no contributions of heads")
    return np.mean([history.table(record, "contribution") for record in known[-_PROBES:]], axis=0)


def prune_order(history: History) -> list[tuple[int, int]]:
    """Every head as `(layer, head)`, those that contribute least to the explained score first.

    Contribution is the mean over the probe images of `|sum dO * O|`: to first order, how much the score changes when
    the head's output is set to zero. It ranks heads of all layers together.

    Raises:
        ValueError: The record keeps no contributions.
    """
    table = mean_contribution(history)
    heads = [(layer, head) for layer, count in enumerate(history.heads) for head in range(count)]
    # a head that could not be measured is no candidate: it goes to the end
    return sorted(heads, key=lambda cell: (np.isnan(table[cell]), table[cell]))
