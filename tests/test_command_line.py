"""The command `gmar`: what it prints, for people and for programs, and its exit codes."""

import json
import os
import pty
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from gmar_lightning.__main__ import COMMANDS, main
from gmar_lightning.monitor.history import History
from gmar_lightning.show.report_command import kinds_of
from gmar_lightning.show.watch import follow
from tests.helpers.synthetic_history import make_history

ROOT = Path(__file__).parents[1]
SCHEMA = json.loads((ROOT / "docs" / "report.schema.json").read_text())


def said(capsys, *arguments):
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as exit_:  # argparse, for arguments that do not fit
        code = exit_.code
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.fixture
def sick(tmp_path):
    return make_history(tmp_path / "sick", probes=12, layers=3, heads=4, dead={(1, 2): 6})


# ------------------------------------------------------------------ for programs


def check(value, schema, where="$"):
    """The part of JSON Schema that docs/report.schema.json uses, without a package for it."""
    kinds = {
        "object": dict,
        "array": list,
        "string": str,
        "integer": int,
        "number": (int, float),
        "boolean": bool,
        "null": type(None),
    }
    if "$ref" in schema:
        schema = SCHEMA["$defs"][schema["$ref"].rsplit("/", 1)[1]]
    allowed = schema.get("type", list(kinds))
    allowed = [allowed] if isinstance(allowed, str) else allowed
    assert any(
        isinstance(value, kinds[kind]) and not (isinstance(value, bool) and kind in ("integer", "number"))
        for kind in allowed
    ), f"{where}: {value!r} is not {allowed}"
    if "enum" in schema:
        assert value in schema["enum"], where
    if isinstance(value, dict):
        assert set(schema.get("required", ())) <= set(value), (
            f"{where}: {set(schema['required']) - set(value)}"
        )
        for name, item in value.items():
            inner = schema.get("properties", {}).get(name, schema.get("additionalProperties", {}))
            assert inner is not False, f"{where}: {name} is not in the schema"
            check(item, inner if isinstance(inner, dict) else {}, f"{where}.{name}")
    if isinstance(value, list):
        for index, item in enumerate(value):
            check(item, schema.get("items", {}), f"{where}[{index}]")


@pytest.mark.parametrize("failed", [(), (3,), tuple(range(12))])
def test_json_follows_its_schema(tmp_path, capsys, failed):
    make_history(tmp_path, probes=12, dead={(1, 2): 6} if not failed else {}, failed=failed)
    code, out, _ = said(capsys, "report", tmp_path, "--json", "--around", 200, "--window", 1)
    assert code == 0
    content = json.loads(out)
    check(content, SCHEMA)
    assert len(content["around"]) == 3


def test_json_says_what_the_record_says(sick, capsys):
    code, out, _ = said(capsys, "report", sick.dir, "--json", "--fail-on", "collapse")
    content = json.loads(out)
    assert code == 1
    assert content["verdict"] == {"headline": "heads collapsed", "healthy": False}
    (finding,) = [finding for finding in content["findings"] if finding["kind"] == "collapse"]
    assert finding["alarm"]
    assert "blocks.1.attn head 2" in finding["text"]
    assert finding["figures"] == {"heads": 1, "first_step": sick.events[0]["step"]}
    assert content["events"] == sick.events
    cards = {(card["layer"], card["head"]): card for card in content["heads"]}
    assert len(cards) == 12
    assert [cell for cell, card in cards.items() if card["flagged"]] == [(1, 2)]
    last = sick.shares()[-1]
    for cell, card in cards.items():
        assert card["signals"]["share"] == pytest.approx(float(last[cell]), rel=1e-3)
    assert cards[1, 2]["events"] == [{"step": sick.events[0]["step"], "kind": "collapsed"}]
    for path in content["paths"].values():
        assert Path(path).exists()
    assert content["probes"]["count"] == 12
    assert content["summary"]["gmar/collapsed_ever"] == 1


def test_around_a_step_gives_whole_probes(sick, capsys):
    _, out, _ = said(capsys, "report", sick.dir, "--json", "--around", sick.steps[6] + 3, "--window", 2)
    probes = json.loads(out)["around"]
    assert [probe["step"] for probe in probes] == sick.steps[4:9].tolist()
    for probe in probes:
        expected = History.load(sick.dir).importance(probe["step"])
        np.testing.assert_allclose(probe["signals"]["importance"], expected, rtol=1e-3)
        assert Path(probe["maps_path"]).is_file()


def test_several_runs_are_a_list(sick, tmp_path, capsys):
    make_history(tmp_path / "well", probes=12)
    code, out, _ = said(capsys, "report", sick.dir, tmp_path / "well", "--json")
    content = json.loads(out)
    assert code == 0
    assert [run["name"] for run in content["runs"]] == ["sick", "well"]
    for run in content["runs"]:
        check(run, SCHEMA)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["collapse"], 1),
        (["collapsed"], 1),  # the event
        (["nonfinite,collapse"], 1),
        (["nonfinite", "diverged, dominance"], 0),
        (["layer"], 0),
        (["colapse"], 2),
        ([""], 2),
    ],
)
def test_the_gate(sick, capsys, words, code):
    options = [part for word in words for part in ("--fail-on", word)]
    found, _, err = said(capsys, "report", sick.dir, *options)
    assert found == code
    assert bool(err) == (code != 0)
    assert code != 2 or "is no finding and no event" in err


def test_a_first_word_is_enough():
    assert kinds_of("layer") == {"layer_vanishing", "layer_restored"}
    assert kinds_of("collapse") == {"collapse"}
    assert kinds_of("drift, layer_vanishing") == {"drift", "layer_vanishing"}


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize("command", ["report", "watch"])
@pytest.mark.parametrize("kind", ["no folder", "no record", "newer format", "no json"])
def test_bad_folders_are_one_sentence_and_2(tmp_path, capsys, command, kind):
    folder = tmp_path / "run"
    if kind != "no folder":
        make_history(folder, probes=2)
    if kind == "no record":
        (folder / "run.json").unlink()
    elif kind == "newer format":
        content = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps({**content, "format": 99}))
    elif kind == "no json":
        (folder / "run.json").write_text("{")
    code, out, err = said(capsys, command, folder)
    assert code == 2
    assert out == ""
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "arguments", [("--around", "7000"), ("--around", "-1"), ("--around", "5", "--window", "-2")]
)
def test_bad_windows(sick, capsys, arguments):
    code, out, err = said(capsys, "report", sick.dir, "--json", *arguments)
    assert (code, out) == (2, "")
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("project", ["alone", "a/b/c", "/p", "e/"])
def test_workspace_wants_entity_and_project(capsys, project):
    code, _, err = said(capsys, "workspace", project)
    assert code == 2
    assert "ENTITY/PROJECT" in err


@pytest.mark.parametrize(
    "settings",
    [
        {"WANDB_API_KEY": ""},  # nobody is logged in
        # wandb itself tries again and again before it gives a server up
        pytest.param(
            {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}, marks=pytest.mark.slow
        ),
    ],
    ids=["without a login", "without network"],
)
def test_workspace_that_cannot_be_saved_is_one_sentence(settings, tmp_path):
    pytest.importorskip("wandb_workspaces")
    # In a process of its own: wandb leaves a service running that later runs would look for.
    environment = {**os.environ, "HOME": str(tmp_path), **settings}
    command = [sys.executable, "-m", "gmar_lightning", "workspace", "somebody/something"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2
    assert len([line for line in done.stderr.splitlines() if "could not be saved" in line]) == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", [name for name, _, _ in COMMANDS])
def test_every_command_explains_itself(capsys, name):
    with pytest.raises(SystemExit) as exit_:
        main([name, "--help"])
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: gmar {name}")
    assert "--help" in printed


def test_help_names_the_commands_and_exit_codes(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    assert all(name in printed for name, _, _ in COMMANDS)
    assert "Exit codes" in printed
    with pytest.raises(SystemExit) as exit_:
        main([])
    assert exit_.value.code == 2


# ------------------------------------------------------------------ watch


def test_watch_says_every_probe_and_event(sick, capsys):
    code, out, _ = said(capsys, "watch", sick.dir, "--once")
    assert code == 0
    lines = [line for line in out.splitlines() if re.match(r"\s+\d+\s+\d+\s", line)]
    assert [int(line.split()[0]) for line in lines] == sick.steps.tolist()
    assert [line for line in out.splitlines() if "collapsed:" in line] == [
        f"           collapsed: {sick.events[0]['message']}"
    ]
    rows = [line for line in out.splitlines() if line.startswith("  L")]
    assert [row[:5] for row in rows] == ["  L00", "  L01", "  L02"]
    assert rows[1][6:][2] == "x"
    assert "\033" not in out


def test_watch_follows_a_job_that_writes_and_one_that_goes_back(tmp_path):
    whole = make_history(tmp_path / "whole", probes=6)
    lines = (whole.dir / "history.jsonl").read_bytes().splitlines(keepends=True)
    folder = tmp_path / "live"
    History.create(folder, {"layers": whole.layers, "heads": whole.heads})
    file = folder / "history.jsonl"

    def job():
        with file.open("ab", buffering=0) as out:
            for line in lines[:4]:
                out.write(line[:50])
                time.sleep(0.03)
                out.write(line[50:])
        time.sleep(0.2)
        file.write_bytes(b"".join(lines[:2]))  # resumed from a checkpoint after the second probe
        time.sleep(0.2)
        with file.open("ab", buffering=0) as out:
            out.write(lines[2])
        (folder / "report.html").write_text("done")

    thread = threading.Thread(target=job)
    thread.start()
    news = list(follow(folder, whole.heads, interval=0.02))
    thread.join()
    back = news.index(None)
    before = [record.step for part in news[:back] for record in part]
    after = [record.step for part in news[back + 1 :] for record in part]
    steps = whole.steps.tolist()
    assert before == steps[:4]
    assert after == steps[:3]


def test_colours_only_on_a_terminal(sick):
    command = [sys.executable, "-m", "gmar_lightning", "watch", str(sick.dir), "--once"]
    environment = {**os.environ, "TERM": "xterm"}
    environment.pop("NO_COLOR", None)
    piped = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True).stdout
    assert b"\033[" not in piped
    here, there = pty.openpty()
    job = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=there)
    os.close(there)
    shown = b""
    while True:
        try:
            part = os.read(here, 65536)
        except OSError:  # the other end was closed
            break
        if not part:
            break
        shown += part
    job.wait()
    os.close(here)
    assert b"\033[31mx\033[0m" in shown
