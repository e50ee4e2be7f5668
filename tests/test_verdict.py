from dataclasses import replace

import numpy as np
import pytest

from gmar_lightning.__main__ import main
from gmar_lightning.monitor.history import History
from gmar_lightning.monitor.record import effective_heads
from gmar_lightning.show.compare import compare, layer_change
from gmar_lightning.show.verdict import collapses, judge
from tests.helpers.synthetic_history import collapse_event, make_history


def still(folder, loss_at=lambda progress: 2.3 - 2.0 * progress, **arguments) -> History:
    return make_history(folder, loss_at=loss_at, **arguments)


def add_probe(
    history: History, kind: str | None = None, layer: int | None = 1, head: int | None = 2, **changes
):
    last = history.records[-1]
    step = last.step + 50
    events = (collapse_event(step, layer, head, kind),) if kind else ()
    history.append(replace(last, step=step, global_step=last.global_step + 50, events=events, **changes))


def kinds(history: History) -> set[str]:
    return {finding.kind for finding in judge(history).findings}


def test_a_healthy_run_raises_no_alarm(tmp_path):
    verdict = judge(still(tmp_path))
    assert verdict.headline == "healthy"
    assert verdict.healthy
    assert {f.kind for f in verdict.findings} <= {"drift"}


def test_collapsed_heads_are_named_with_their_steps(tmp_path):
    history = still(tmp_path, dead={(1, 2): 6, (3, 0): 10})
    verdict = judge(history)
    assert verdict.headline == "heads collapsed"
    text = next(f.text for f in verdict.findings if f.kind == "collapse")
    assert "2 heads" in text
    assert "blocks.1.attn head 2 (step 399)" in text
    assert [(c.layer, c.head, c.step, c.since_step) for c in collapses(history)] == [
        (1, 2, 399, 299),
        (3, 0, 599, 499),
    ]


def test_a_recovered_head_is_no_alarm_and_a_second_collapse_is(tmp_path):
    history = still(tmp_path, dead={(1, 2): 6})
    add_probe(history, "recovered")
    assert judge(history).healthy
    assert "recovered" in kinds(history)
    assert collapses(history)[0].recovered_step == history.records[-1].step
    add_probe(history, "collapsed")
    assert judge(history).headline == "heads collapsed"


@pytest.mark.parametrize(
    ("begins", "ends", "found", "head"),
    [
        ("layer_vanishing", "layer_restored", "layer_vanishing", None),
        ("dominance", "dominance_end", "dominance", 2),
        ("global_shrink", "global_restored", "global_shrink", None),
        ("dormant", "woke", "dormant", 2),
    ],
)
def test_what_ended_is_not_found_any_more(tmp_path, begins, ends, found, head):
    history = still(tmp_path)
    add_probe(history, begins, head=head)
    assert found in kinds(history)
    assert judge(history).healthy is (begins != "layer_vanishing")
    add_probe(history, ends, head=head)
    assert found not in kinds(history)


def test_nonfinite_importance_and_loss(tmp_path):
    history = still(tmp_path / "a")
    add_probe(history, "nonfinite", layer=None, head=None)
    assert judge(history).headline == "not finite"
    history = still(tmp_path / "b")
    add_probe(history, metrics={"train_loss": float("nan")})
    assert judge(History.load(tmp_path / "b")).headline == "diverged"


def test_divergence_is_told_from_noise_and_overfitting(tmp_path):
    up = still(tmp_path / "up", loss_at=lambda p: 2.3 - 3 * p if p < 0.5 else 0.8 + 3 * (p - 0.5))
    assert judge(up).headline == "diverged"
    noisy = still(tmp_path / "noisy", loss_at=lambda p: 2.3 * np.exp(-3 * p) * (1 + 0.2 * np.sin(40 * p)))
    assert judge(noisy).healthy
    tiny = still(tmp_path / "tiny", loss_at=lambda p: 0.004 if p > 0.9 else max(2.3 - 4 * p, 0.001))
    assert judge(tiny).healthy


def test_nothing_learned_needs_flat_accuracy_and_flat_loss(tmp_path):
    def flat(record, accuracy, loss):
        return replace(record, metrics={"val_acc": accuracy, "train_loss": loss})

    history = still(tmp_path)
    records = [flat(r, 0.1 + 0.01 * (k % 2), 2.30 - 0.001 * k) for k, r in enumerate(history.records)]
    assert judge(History(tmp_path, history.run, records)).headline == "nothing learned"
    records = [flat(r, 0.1, 2.3 - 0.05 * k) for k, r in enumerate(history.records)]
    assert judge(History(tmp_path, history.run, records)).healthy
    records = [flat(r, 0.97, 0.1) for r in history.records]
    assert judge(History(tmp_path, history.run, records)).healthy


def test_drift_is_reported_by_its_number(tmp_path):
    history = still(tmp_path)
    drift = {"rank_correlation_first": np.array([0.1, 0.2, np.nan])}
    add_probe(history, drift=drift)
    finding = next(f for f in judge(history).findings if f.kind == "drift")
    assert "0.15" in finding.text
    add_probe(history, drift={"rank_correlation_first": np.array([0.9, 0.8, 0.95])})
    assert "drift" not in kinds(history)


def test_failed_probes_and_runs_without_any(tmp_path):
    assert "failed_probes" in kinds(still(tmp_path / "some", failed=(3,)))
    nothing = judge(still(tmp_path / "all", probes=2, failed=(0, 1)))
    assert nothing.headline == "no probe"
    assert compare([History.load(tmp_path / "all")]).startswith("all: no probe")


def test_a_few_probes_are_too_few_to_call_a_run_healthy(tmp_path):
    assert judge(still(tmp_path / "5", probes=5)).headline == "too early to say"
    assert judge(still(tmp_path / "6", probes=6)).headline == "healthy"


def test_effective_heads_by_hand():
    shares = np.array([[0.25] * 4, [1.0, 0, 0, 0], [0.5, 0.5, np.nan, np.nan], [np.nan] * 4])
    np.testing.assert_allclose(effective_heads(shares), [4.0, 1.0, 2.0, np.nan])


def test_layer_change_is_last_over_first(tmp_path):
    history = still(tmp_path)
    first = history.importance(0)
    add_probe(history, signals={"importance": np.concatenate([first[:1] * 3, first[1:] / 2])})
    np.testing.assert_allclose(layer_change(history), [3.0, 0.5, 0.5, 0.5], rtol=1e-6)


def test_comparison_says_who_collapsed_where(tmp_path):
    healthy, sick = still(tmp_path / "healthy"), still(tmp_path / "sick", dead={(1, 2): 6})
    text = compare([healthy, sick])
    line = next(line for line in text.splitlines() if line.startswith("blocks.1.attn head 2"))
    assert line.split("  ")[-1].strip() == "step 399 (since 299)"
    assert "healthy: healthy" in text
    assert "sick: heads collapsed" in text
    other = still(tmp_path / "other", layers=2, heads=3)
    assert "other: healthy" in compare([healthy, other])


def test_the_command_prints_writes_and_exits_for_ci(tmp_path, capsys):
    still(tmp_path / "healthy" / "gmar")
    still(tmp_path / "sick" / "gmar", dead={(1, 2): 6})
    runs = [str(tmp_path / "healthy"), str(tmp_path / "sick" / "gmar")]
    assert main(["report", *runs]) == 0
    assert "sick: heads collapsed" in capsys.readouterr().out
    assert (tmp_path / "healthy" / "gmar" / "report.html").is_file()
    out = tmp_path / "deep" / "both.html"
    assert main(["report", *runs, "-o", str(out), "--fail-on", "collapse"]) == 1
    assert out.is_file()
    assert main(["report", runs[0], "--fail-on", "collapse", "--fail-on", "diverged"]) == 0
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "no GMAR record" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["report", runs[0], "--fail-on", "everything"])
    assert stopped.value.code == 2
