from pathlib import Path

from gmar_lightning.monitor.events import HeadEvent
from gmar_lightning.show.console import alarm_text, closing_lines, event_table


def event(step, message):
    return HeadEvent(step, "collapsed", 0, 1, "blocks.0.attn", 0.01, 0.2, step - 4, message)


def test_closing_lines_say_accuracy_cost_flags_and_where_to_look():
    lines = closing_lines(
        metrics={"val/accuracy": 0.9731, "train/loss": 0.1},
        probes=7,
        failed=1,
        probe_seconds=2.0,
        run_seconds=50.0,
        flagged=[("blocks.0.attn", 3)],
        folder=Path("runs/x/gmar"),
        wandb_offline=Path("wandb/offline-run-1"),
    )
    text = "\n".join(lines)
    assert "val/accuracy 0.9731" in text
    assert "train/loss" not in text
    assert "7, 1 failed: 2.0 s, 4.0 % of 50 s" in text
    assert "blocks.0.attn head 3" in text
    assert "runs/x/gmar/report.html" in text
    assert "wandb leet wandb/offline-run-1" in text
    assert "wandb sync wandb/offline-run-1" in text


def test_closing_lines_leave_out_what_there_is_not():
    lines = closing_lines(
        metrics={},
        probes=1,
        failed=0,
        probe_seconds=0.0,
        run_seconds=0.0,
        flagged=[],
        folder=None,
        wandb_offline=None,
    )
    assert lines == ["GMAR", "  probes     1: 0.0 s, 0.0 % of 0 s", "  flagged    none"]


def test_many_alarms_of_one_probe_make_one_text():
    text = alarm_text([event(9, f"head {i} collapsed.") for i in range(20)], most=3)
    assert text.count("collapsed.") == 3
    assert "And 17 more." in text


def test_event_table_keeps_the_newest():
    events = [{"step": step, "kind": "collapsed", "message": f"m{step}"} for step in range(50)]
    lines = event_table(events, most=40)
    assert lines[-1].endswith("m49")
    assert "10 earlier ones" in lines[1]
    assert event_table([]) == []
