"""What goes wrong with the record: deleted, damaged, taken, full, of another model. The run goes on, and says so."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gmar_lightning import History
from gmar_lightning.monitor.lock import FolderLock
from tests.helpers.synthetic_history import make_history
from tests.helpers.tiny import Classifier, fit, loaders, watcher
from tests.test_faults import At, lines, run
from tests.test_resume import check, finish, said


def resumed(
    folder: Path,
    between: Callable[[], object] = lambda: None,
    module: Callable[[], Any] = Classifier,
    before: dict[str, Any] | None = None,
    after: dict[str, Any] | None = None,
) -> tuple[list[str], Any]:
    """Four steps, a checkpoint, what happens in between, four more; what was said in the second part."""
    trainer, _ = fit(
        folder, Classifier(), loaders(16), callbacks=[watcher(folder, **(before or {}))], max_epochs=1
    )
    trainer.save_checkpoint(folder / "a.ckpt")
    between()
    again = watcher(folder, **{"on_error": "warn", **(after or {})})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(folder, module(), loaders(16), callbacks=[again], max_epochs=2, ckpt_path=str(folder / "a.ckpt"))
    assert again.watches[0].prober.taken  # the second part did probe
    found = [str(warning.message) for warning in caught]
    return [
        s for s in found if "history.jsonl" in s or (s.startswith("GMARCallback") and "numbers only" not in s)
    ], again


def steps(folder: Path) -> list[int]:
    return [record.global_step for record in History.load(folder).records]


def test_folder_deleted_in_mid_run(tmp_path: Path) -> None:
    def delete(trainer: Any, module: Any) -> None:
        shutil.rmtree(tmp_path / "gmar")

    spoken, _, rows = run(tmp_path, callbacks=[At(9, delete)])
    assert len(spoken) == 1
    assert "was deleted in mid-run; the record goes on" in spoken[0]
    assert steps(tmp_path / "gmar") == [10, 12, 14, 16]
    assert len(rows.of_gmar()) == 9
    assert len(History.load(tmp_path / "gmar").input_paths()) == 2  # the photographs are back
    assert (tmp_path / "gmar" / "report.html").is_file()


def test_disk_full_and_free_again(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(trainer: Any, module: Any) -> None:
        size = (tmp_path / "gmar" / "history.jsonl").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, hard))

    def free(trainer: Any, module: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    try:
        spoken, _, rows = run(tmp_path, callbacks=[At(5, fill), At(11, free)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len([sentence for sentence in spoken if "the record failed at step 5" in sentence]) == 1, spoken
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert steps(tmp_path / "gmar") == [0, 2, 4, 12, 14, 16]
    assert len(rows.of_gmar()) == 9
    assert not [path for path in (tmp_path / "gmar").rglob("*.partial") if path.stat().st_size == 0]


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    """The second begins while the first trains; each has its own record, and goes on with it when resumed."""
    spoken: list[str] = []

    def begin_another(trainer: Any, module: Any) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            other, _ = fit(tmp_path, Classifier(), loaders(16), callbacks=[watcher(tmp_path)], max_epochs=1)
        other.save_checkpoint(tmp_path / "other.ckpt")
        spoken.extend(str(warning.message) for warning in caught if "another run" in str(warning.message))

    first, _, _ = run(tmp_path, callbacks=[At(5, begin_another)])
    assert not first
    assert spoken == [
        f"GMARCallback: another run writes to {tmp_path}/gmar; the record of this one goes to {tmp_path}/gmar_2"
    ]
    assert steps(tmp_path / "gmar") == list(range(0, 17, 2))
    assert steps(tmp_path / "gmar_2") == [0, 3, 4]
    fit(
        tmp_path, Classifier(), loaders(16), callbacks=[watcher(tmp_path)], max_epochs=2,
        ckpt_path=str(tmp_path / "other.ckpt"),
    )  # fmt: skip
    assert steps(tmp_path / "gmar_2") == [0, 3, 4, 6, 8]
    assert steps(tmp_path / "gmar") == list(range(0, 17, 2))
    # Nobody writes any more: the folder is free, and what was in it is kept.
    fit(tmp_path, Classifier(), loaders(16), callbacks=[watcher(tmp_path)], max_epochs=1)
    assert steps(tmp_path / "gmar" / "previous_01") == list(range(0, 17, 2))


def test_a_lock_ends_with_its_process_and_holds_against_others(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        held = FolderLock(tmp_path / "gmar")
        os.write(writer, b"1")
        signal.sigtimedwait({signal.SIGUSR1}, 60)
        os._exit(held is None)
    os.read(reader, 1)
    mine = FolderLock(tmp_path / "gmar")
    assert mine.folder == tmp_path / "gmar_2"
    mine.release()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert FolderLock(tmp_path / "gmar").folder == tmp_path / "gmar"


@pytest.mark.parametrize("damage", ["torn", "garbage", "deep", "empty", "run.json"])
def test_record_damaged_before_a_resume(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "gmar" / "history.jsonl"

    def spoil() -> None:
        content = path.read_bytes()
        first = content.index(b"\n") + 1
        spoilt = {
            "torn": content[: len(content) - 200],
            "garbage": content[:first] + os.urandom(300).replace(b"\n", b"") + b"\n" + content[first:],
            "deep": content[:first] + b"[" * 100_000 + b"\n" + content[first:],
            "empty": b"",
            "run.json": content,
        }
        path.write_bytes(spoilt[damage])
        if damage == "run.json":
            (tmp_path / "gmar" / "run.json").write_text("{")

    spoken, _ = resumed(tmp_path, spoil)
    expected = {"torn": [0, 3, 6, 8], "empty": [6, 8], "run.json": [6, 8]}.get(damage, [0, 3, 4, 6, 8])
    assert steps(tmp_path / "gmar") == expected
    if damage in ("garbage", "deep"):
        assert any("line 2 is damaged and left out" in sentence for sentence in spoken)
    if damage == "run.json":
        assert any("a new record begins" in sentence for sentence in spoken)
        assert (tmp_path / "gmar" / "previous_01" / "history.jsonl").is_file()


def test_no_damage_of_a_line_keeps_a_record_from_being_read(tmp_path: Path) -> None:
    """Bytes changed, dropped and doubled at random, and values of every wrong type."""
    make_history(tmp_path, probes=3, signals=True)
    path, draw = tmp_path / "history.jsonl", random.Random(1)
    good = path.read_bytes()
    line = json.loads(good.splitlines()[1])
    wrong = [None, True, -1, 1e99, "x", "\0", [], [[]], [["a"]], {}, {"a": [1]}, [None], "ä" * 9]
    lines_ = [json.dumps({**line, key: value}).encode() for key in line for value in wrong]
    lines_ += [json.dumps(value).encode() for value in wrong]
    lines_ += [b"1" * 5000, b"\xff\xfe", b"{" * 5000, b"NaN"]
    for _ in range(200):
        torn = bytearray(good.splitlines()[1])
        for _ in range(draw.randrange(1, 5)):
            torn[draw.randrange(len(torn))] = draw.choice([c for c in range(256) if c != 10])
        lines_.append(bytes(torn))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for bad in lines_:
            path.write_bytes(bad + b"\n" + good)
            assert len(History.load(tmp_path).records) >= 3


class Surgery(Classifier):
    """A checkpoint of another shape: what fits is taken over, the optimizer begins anew."""

    def __init__(self, **changes: Any) -> None:
        super().__init__(**changes)
        self.strict_loading = False

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["optimizer_states"] = []


@pytest.mark.parametrize("changes", [{"depth": 3}, {"depth": 1}, {"num_heads": 4}])
def test_resumed_with_another_model(changes: dict[str, int], tmp_path: Path) -> None:
    spoken, again = resumed(tmp_path, module=lambda: Surgery(**changes))
    assert len(spoken) == 1
    assert "the model is not the one of the record" in spoken[0]
    history = History.load(tmp_path / "gmar")
    assert steps(tmp_path / "gmar") == [6, 8]
    assert not any(record.failure for record in history.records)
    layers, heads = changes.get("depth", 2), changes.get("num_heads", 2)
    assert history.importance().shape == (2, layers, heads)
    assert history.heads == [heads] * layers
    assert len(history.input_paths()) == 2
    assert len(again.detector.states) == layers
    assert steps(tmp_path / "gmar" / "previous_01") == [0, 3, 4]


def test_resumed_with_another_interval_and_probe_size(tmp_path: Path) -> None:
    for name, settings, expected, segments in (
        ("interval", {"every_n_train_steps": 2}, [0, 3, 4, 6, 8], 1),
        ("epochs", {"every_n_train_steps": None, "every_n_epochs": 1}, [0, 3, 4, 8], 1),
        ("size", {"num_images": 4}, [0, 3, 4, 6, 8], 2),
        ("drawn", {"num_heatmaps": 4}, [0, 3, 4, 6, 8], 1),
    ):
        folder = tmp_path / name
        spoken, _ = resumed(folder, after=settings)
        assert steps(folder / "gmar") == expected, name
        assert len(History.load(folder / "gmar").run["segments"]) == segments, name
        assert len(spoken) == segments - 1, (name, spoken)


def test_clock_set_back(tmp_path: Path) -> None:
    """Files of the future: the record goes on, and durations are never negative."""

    def age() -> None:
        for path in (tmp_path / "gmar").rglob("*"):
            os.utime(path, (4e9, 4e9))

    spoken, _ = resumed(tmp_path, age)
    assert not spoken
    assert steps(tmp_path / "gmar") == [0, 3, 4, 6, 8]
    assert all(record.seconds > 0 for record in lines(tmp_path))
    sources = Path(sys.modules["gmar_lightning"].__file__ or "").parent.rglob("*.py")
    # Nothing depends on the time of day.
    assert not [
        path for path in sources if "time.time(" in path.read_text() or "datetime" in path.read_text()
    ]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_while_the_report_is_written(number: int, tmp_path: Path) -> None:
    code = finish(tmp_path, ("report", number))
    assert code in (0, -number)
    assert "Traceback" not in said(tmp_path)
    assert (code == 0) == (tmp_path / "gmar" / "report.html").is_file()
    check(tmp_path)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 40
