"""Every example of docs/examples runs as it stands, in an empty folder."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.synthetic_history import make_history

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
WRITES_A_RECORD = {"callback", "hugging_face", "timm_finetune", "own_on_collapse", "early_stopping"}
OTHERS = {"notebook", "sweep", "clip_similarity", "segmentation"}


def run(name, folder, monkeypatch, *arguments):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def test_no_example_is_left_out():
    known = WRITES_A_RECORD | OTHERS | {"ci_gate"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == known


@pytest.mark.parametrize("name", sorted(WRITES_A_RECORD))
def test_training_examples_leave_a_record_and_a_report(name, tmp_path, monkeypatch):
    run(name, tmp_path, monkeypatch)
    assert len(list(tmp_path.rglob("history.jsonl"))) == 1
    assert len(list(tmp_path.rglob("report.html"))) == 1


def test_notebook(tmp_path, monkeypatch):
    run("notebook", tmp_path, monkeypatch)
    assert (tmp_path / "result.html").read_text().count("<img") == 3


def test_clip(tmp_path, monkeypatch, capsys):
    run("clip_similarity", tmp_path, monkeypatch)
    assert "[1, 4, 4]" in capsys.readouterr().out


def test_segmentation(tmp_path, monkeypatch, capsys):
    run("segmentation", tmp_path, monkeypatch)
    assert "[2, 2, 3]) torch.Size([2, 4, 4])" in capsys.readouterr().out


def test_sweep(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    run("sweep", tmp_path, monkeypatch)
    wandb.teardown()
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 2
    assert len(list(tmp_path.glob("runs/*/history.jsonl"))) == 2


@pytest.mark.parametrize(("dead", "code"), [({}, 0), ({(1, 1): 8}, 1)])
def test_gate(tmp_path, dead, code):
    make_history(tmp_path / "run", dead=dead)
    command = [sys.executable, EXAMPLES / "ci_gate.py", tmp_path / "run"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=EXAMPLES.parents[1])
    assert done.returncode == code, done.stderr
    assert ("ALARM" in done.stdout) == bool(code)


def test_gate_without_a_record(tmp_path):
    command = [sys.executable, EXAMPLES / "ci_gate.py", tmp_path / "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=EXAMPLES.parents[1])
    assert done.returncode == 1
    assert "no usable record" in done.stderr
