import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from gmar_lightning.monitor.history import History
from gmar_lightning.monitor.record import ProbeRecord
from tests.helpers.synthetic_history import make_history


def probe(step: int, importance=None, maps=None, **fields) -> ProbeRecord:
    signals = {} if importance is None else {"importance": np.asarray(importance)}
    maps = {} if maps is None else {"paper": maps}
    return ProbeRecord(**{"step": step, "global_step": step + 1, "signals": signals, "maps": maps, **fields})


def lines(records) -> list[dict]:
    return [record.to_json() for record in records]


def small_run() -> dict:
    return {"layers": ["a.attn", "b.attn"], "heads": [3, 2], "fingerprint": "x"}


def test_what_was_appended_is_read_back(tmp_path):
    importance = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, np.nan]], dtype=np.float32)
    maps = np.random.default_rng(0).random((2, 5, 7)).astype(np.float32)
    written = History.create(tmp_path, small_run())
    written.append(probe(99, importance, maps, metrics={"acc": np.float32(0.5)}))
    read = History.load(tmp_path)
    assert lines(read.records) == lines(written.records)
    np.testing.assert_array_equal(read.importance(99), importance)
    np.testing.assert_array_equal(read.importance(), importance[None])
    np.testing.assert_allclose(read.heatmaps(99), maps, atol=0.5 / 254)  # half of the last bit of 8
    np.testing.assert_array_equal(read.metric("acc"), [0.5])
    assert (tmp_path / "maps" / "step_00000099.npz").is_file()
    with np.load(tmp_path / "maps" / "step_00000099.npz") as stored:
        assert stored["levels"].dtype == np.uint8


def test_nothing_but_plain_json_reaches_the_disk(tmp_path):
    history = History.create(tmp_path, small_run())
    importance = [[np.nan, np.inf, 1.0], [1.0, 2.0, np.nan]]
    history.append(probe(0, importance, metrics={"größe": np.float32(np.nan)}, scores=(np.inf,)))
    text = (tmp_path / "history.jsonl").read_text(encoding="utf-8")
    line = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert line["importance"] == [[None, None, 1.0], [1.0, 2.0, None]]
    assert "größe" in text


@pytest.mark.parametrize("factor", [1e-9, 1.0, 1e7], ids=["tiny", "plain", "huge"])
def test_maps_of_any_magnitude_survive_8_bits(tmp_path, factor):
    maps = (factor * np.random.default_rng(0).random((3, 6, 6))).astype(np.float32)
    history = History.create(tmp_path, small_run())
    maps[0, 0, 0], maps[1] = np.nan, 0.25 * factor
    history.append(probe(0, maps=maps))
    np.testing.assert_allclose(history.heatmaps(0), maps, atol=factor * 2e-3)
    np.testing.assert_array_equal(history.heatmaps(0)[1], maps[1])


def test_a_torn_last_line_is_dropped_and_does_not_spoil_the_next_one(tmp_path):
    make_history(tmp_path, probes=3)
    with (tmp_path / "history.jsonl").open("ab") as file:
        file.write(b'{"step": 149, "glo')
    history = History.load(tmp_path)
    assert history.steps.tolist() == [0, 49, 99]
    history.append(probe(149))
    assert History.load(tmp_path).steps.tolist() == [0, 49, 99, 149]


def test_a_damaged_line_in_the_middle_is_left_out_with_a_warning(tmp_path):
    make_history(tmp_path, probes=3)
    lines = (tmp_path / "history.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "history.jsonl").write_bytes(lines[0] + b"\x00\x00\n" + lines[2])
    with pytest.warns(RuntimeWarning, match="line 2 is damaged"):
        assert History.load(tmp_path).steps.tolist() == [0, 99]


def test_a_killed_process_loses_at_most_the_probe_in_flight(tmp_path):
    writer = (
        "import sys, numpy as np\n"
        "from gmar_lightning.monitor.history import History\n"
        "from gmar_lightning.monitor.record import ProbeRecord\n"
        "history = History.create(sys.argv[1], {'layers': ['a'], 'heads': [2]})\n"
        "for n in range(10**6):\n"
        "    maps = {'paper': np.full((2, 4, 4), n / 1e3)}\n"
        "    signals = {'importance': np.array([[1.0, float(n)]])}\n"
        "    record = ProbeRecord(n, n + 1, signals=signals, metrics={'x' * 20000: 1.0}, maps=maps)\n"
        "    history.append(record)\n"
        "    print(n, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", writer, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    time.sleep(0.5)
    while len(list((tmp_path / "maps").glob("*.npz"))) < 20:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    said = [int(line) for line in process.stdout.read().split()]
    process.wait()
    history = History.load(tmp_path)
    assert len(history.records) in (said[-1] + 1, said[-1] + 2)
    assert history.steps.tolist() == list(range(len(history.records)))
    for step in history.steps:
        assert history.heatmaps(int(step)).mean() == pytest.approx(step / 1e3, abs=1e-3)


def test_resuming_repeats_nothing_and_leaves_no_gap(tmp_path):
    whole = make_history(tmp_path / "whole", probes=8)
    resumed = make_history(tmp_path / "resumed", probes=8)
    for record in resumed.records:
        resumed.save_overlays(record, [np.zeros((8, 8, 3), np.uint8)])
    with (tmp_path / "resumed" / "history.jsonl").open("ab") as file:
        file.write(b'{"torn')
    history = History.load(tmp_path / "resumed")
    history.rewind(global_step=200)
    assert history.steps.tolist() == [0, 49, 99, 149, 199]
    assert sorted(p.stem for p in (tmp_path / "resumed" / "maps").iterdir()) == [
        f"step_{step:08d}" for step in history.steps
    ]
    assert len(list((tmp_path / "resumed" / "heatmaps").iterdir())) == 5
    for record in whole.records[5:]:
        history.append(replace(record, maps=whole.maps_of(record)))
    assert lines(History.load(tmp_path / "resumed").records) == lines(whole.records)
    text = (tmp_path / "resumed" / "history.jsonl").read_bytes()
    assert text == (tmp_path / "whole" / "history.jsonl").read_bytes()


def test_a_probe_that_does_not_come_after_the_last_one_is_refused(tmp_path):
    history = make_history(tmp_path, probes=3)
    before = (tmp_path / "history.jsonl").read_bytes()
    with pytest.raises(ValueError, match="rewind"):
        history.append(probe(49))
    with pytest.raises(ValueError, match="layers"):
        history.append(probe(999, [[1.0]]))
    assert (tmp_path / "history.jsonl").read_bytes() == before


def test_step_zero_before_and_after_the_first_batch_keep_their_own_maps(tmp_path):
    history = History.create(tmp_path, small_run())
    for global_step in (0, 1):
        history.append(probe(0, maps=np.full((1, 2, 2), 1.0 + global_step), global_step=global_step))
    assert len(list((tmp_path / "maps").iterdir())) == 2
    history.rewind(0)
    assert history.heatmaps(0).max() == 1.0


def test_a_failed_probe_is_a_gap(tmp_path):
    history = make_history(tmp_path, probes=4, failed=(2,))
    assert history.importance().shape == (4, 4, 6)
    assert np.isnan(history.importance()[2]).all()
    assert np.isfinite(history.importance()[[0, 1, 3]]).all()
    assert history.records[2].failure == "CUDA out of memory"
    with pytest.raises(KeyError, match="no heatmaps"):
        history.heatmaps(99)


def test_changed_probe_images_start_a_segment(tmp_path):
    history = make_history(tmp_path, probes=3)
    number = history.add_segment("other", from_step=149, changes={"labels": [1], "num_heatmaps": 1})
    history.save_inputs([np.zeros((4, 4, 3), np.uint8)], segment=number)
    history.append(probe(149, maps=np.ones((1, 8, 8))))
    assert history.records[-1].segment == number
    read = History.load(tmp_path)
    assert read.segment_run(number)["labels"] == [1]
    assert read.segment_run(0)["num_heatmaps"] == 3
    assert len(read.input_paths(0)) == 3
    assert len(read.input_paths(number)) == 1
    read.rewind(100)
    assert [segment["segment"] for segment in History.load(tmp_path).run["segments"]] == [0]


def test_an_older_record_in_the_folder_is_kept_aside(tmp_path):
    make_history(tmp_path, probes=2)
    make_history(tmp_path, probes=3)
    make_history(tmp_path, probes=4)
    assert len(History.load(tmp_path).records) == 4
    assert len(History.load(tmp_path / "previous_01").records) == 2
    assert len(History.load(tmp_path / "previous_02").records) == 3
    assert History.load(tmp_path / "previous_02").heatmaps(99).shape == (3, 8, 8)


def test_tidy_rows_and_pandas_agree_with_the_tables(tmp_path):
    history = make_history(tmp_path, probes=5, dead={(1, 2): 1}, failed=(2,), signals=True)
    rows = list(history.rows())
    assert len(rows) == 4 * 4 * 6
    row = next(r for r in rows if r["step"] == 199 and r["layer"] == 1 and r["head"] == 2)
    assert row["importance"] == history.importance(199)[1, 2]
    assert row["share"] == history.shares(199)[1, 2]
    assert row["flagged"]
    assert row["entropy"] == history.values("entropy", 199)[1, 2]
    assert 0 < row["entropy"] < 1
    assert row["layer_name"] == "blocks.1.attn"
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    frame = history.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert frame.groupby(["step", "layer"]).share.sum().to_numpy() == pytest.approx(1.0)


def test_without_pandas_the_error_says_what_to_install(tmp_path, monkeypatch):
    history = make_history(tmp_path, probes=1)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        history.to_pandas()


def test_ragged_layers_are_padded_with_nan(tmp_path):
    history = History.create(tmp_path, small_run())
    history.append(probe(0, [[2.0, 3.0, 5.0], [1.0, 1.0, np.nan]]))
    np.testing.assert_allclose(history.shares(0), [[0.2, 0.3, 0.5], [0.5, 0.5, np.nan]], rtol=1e-6)
    np.testing.assert_array_equal(History.load(tmp_path).shares(0), history.shares(0))


def test_an_empty_record_answers_with_empty_arrays(tmp_path):
    History.create(tmp_path, small_run())
    history = History.load(tmp_path)
    assert history.importance().shape == (0, 2, 3)
    assert history.events == []
    assert history.steps.tolist() == []


def test_plain_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no GMAR record in"):
        History.load(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        History.load(tmp_path)
    (tmp_path / "run.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="format 1"):
        History.load(tmp_path)
    history = make_history(tmp_path / "run", probes=1)
    with pytest.raises(KeyError, match="no probe at step 7"):
        history.importance(7)
