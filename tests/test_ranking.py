"""Heads ranked by contribution."""

from dataclasses import replace

import numpy as np
import pytest

from gmar_lightning import prune_order
from gmar_lightning.monitor.history import History
from gmar_lightning.show.compare import compare
from tests.helpers.synthetic_history import make_history


def test_the_weakest_contributors_come_first(tmp_path):
    history = make_history(tmp_path, probes=8, signals=True, dead={(1, 2): 2, (3, 0): 3})
    order = prune_order(history)
    assert set(order[:2]) == {(1, 2), (3, 0)}
    assert sorted(order) == [(layer, head) for layer in range(4) for head in range(6)]
    mean = np.mean([history.contribution(step) for step in history.steps[-3:]], axis=0)
    assert order == sorted(order, key=lambda cell: mean[cell])


def test_the_report_in_the_terminal_names_them(tmp_path):
    history = make_history(tmp_path, probes=8, signals=True, dead={(1, 2): 2, (3, 0): 3})
    lines = compare([history]).splitlines()
    keep, prune = (
        next(line for line in lines if line.strip().startswith(word)) for word in ("keep", "prune")
    )
    best = prune_order(history)[-1]
    assert f"blocks.{best[0]}.attn head {best[1]}" in keep
    assert "blocks.1.attn head 2" in prune
    assert "blocks.3.attn head 0" in prune


def test_ragged_layers_and_missing_values_are_no_candidates(tmp_path):
    history = make_history(tmp_path, probes=2, layers=2, heads=3, signals=True)
    table = np.array([[0.3, 0.1, np.nan], [0.2, np.nan, 0.05]])
    record = replace(history.records[-1], signals={**history.records[-1].signals, "contribution": table})
    ragged = History(tmp_path, {**history.run, "heads": [2, 3]}, [record])
    assert prune_order(ragged) == [(1, 2), (0, 1), (1, 0), (0, 0), (1, 1)]


def test_a_record_without_contributions_says_so(tmp_path):
    history = make_history(tmp_path, probes=2)
    with pytest.raises(ValueError, match="no contributions"):
        prune_order(history)
    assert "prune" not in compare([history])
