"""All processes as one: the same numbers from one, two and three real processes."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from gmar_lightning.monitor.collapse import CollapseDetector
from gmar_lightning.monitor.probe import ProbeBatch
from gmar_lightning.monitor.probing import Moment, Prober
from gmar_lightning.monitor.processes import (
    ProbeError,
    joined,
    of_first_process,
    on_every_process,
    rows_of_process,
)
from gmar_lightning.monitor.settings import ProbeSettings
from tests.helpers.tiny import images_of, vit

# One process imports everything once and forks the others.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.test_processes"])


def probe_in(rank: int, world: int, folder: Path) -> None:
    """Two probes of a model whose heads collapse at once, in process `rank` of `world`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    torch.manual_seed(0)
    model = vit(embed_dim=32, num_heads=4)
    detector = CollapseDetector(warmup=4, dormant_after=50, patience=1)
    prober = Prober(ProbeSettings(faithfulness_every=1), detector=detector, on_error="raise")
    prober.begin(ProbeBatch(images_of(5), torch.tensor([0, 1, 2, 3, 0])))
    lines: list[dict[str, Any]] = []
    for step in range(12):
        if step == 8:
            with torch.no_grad():
                model.blocks[1].attn.proj.weight[:, 8:16] = 0
        record = prober.take(model, Moment(step, step))
        if step == 0 or record.events:
            lines.append(record.to_json())
    for line in lines:
        line["seconds"] = None
    torch.save({"lines": lines, "first": of_first_process(rank)}, folder / f"rank_{rank}.pt")
    try:
        on_every_process(lambda: 1 // (world - 1 - rank))
    except (ProbeError, ZeroDivisionError) as error:
        (folder / f"error_{rank}").write_text(str(error))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folders = {}
    for world in (1, 2, 3):
        folders[world] = tmp_path_factory.mktemp(f"world_{world}")
        processes = [
            CONTEXT.Process(target=probe_in, args=(rank, world, folders[world])) for rank in range(world)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout=200)
            assert process.exitcode == 0
    return folders


def lines_of(folder: Path, rank: int) -> list[dict[str, Any]]:
    return torch.load(folder / f"rank_{rank}.pt", weights_only=False)["lines"]


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, 3])
def test_the_record_does_not_depend_on_the_number_of_processes(world: int, worlds: dict[int, Path]) -> None:
    alone = lines_of(worlds[1], 0)
    for rank in range(world):
        assert torch.load(worlds[world] / f"rank_{rank}.pt", weights_only=False)["first"] == 0
        for line, expected in zip(lines_of(worlds[world], rank), alone, strict=True):
            for name, value in expected["faithfulness"].items():
                assert line["faithfulness"][name] == pytest.approx(value, rel=1e-4, abs=1e-7), name
            np.testing.assert_allclose(line["importance"], expected["importance"], rtol=1e-3)
            assert line["predictions"] == expected["predictions"]
            assert [event["kind"] for event in line["events"]] == [
                event["kind"] for event in expected["events"]
            ]
            for event, same in zip(line["events"], expected["events"], strict=True):
                for name in ("ablation_logit", "ablation_loss", "control_logit", "control_loss"):
                    assert (event[name] is None) == (same[name] is None)
                    assert event[name] is None or event[name] == pytest.approx(
                        same[name], rel=1e-3, abs=1e-6
                    ), name


@pytest.mark.distributed
def test_something_was_compared(worlds: dict[int, Path]) -> None:
    first, *flagged = lines_of(worlds[1], 0)
    assert all(value is not None for value in first["faithfulness"].values())
    events = [event for line in flagged for event in line["events"]]
    assert "collapsed" in [event["kind"] for event in events]
    assert any(event["ablation_loss"] is not None for event in events)


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, 3])
def test_one_failure_is_everyones(world: int, worlds: dict[int, Path]) -> None:
    said = [(worlds[world] / f"error_{rank}").read_text() for rank in range(world)]
    assert "division" in said[-1]
    assert all(f"on process {world - 1}: ZeroDivisionError" in text for text in said[:-1])


@pytest.mark.parametrize("count", [1, 2, 5, 8])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_joined_undoes_the_split(count: int, world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from gmar_lightning.monitor import processes

    monkeypatch.setattr(processes, "_many", lambda: True)
    monkeypatch.setattr(processes.dist, "get_world_size", lambda: world)
    values = np.arange(count * 3).reshape(count, 3)
    parts = []
    for rank in range(world):
        monkeypatch.setattr(processes.dist, "get_rank", lambda rank=rank: rank)
        parts.append({"values": values[rows_of_process(count)]})
    assert len({len(part["values"]) for part in parts}) == 1  # equally many, so that none waits
    np.testing.assert_array_equal(joined(parts, count)["values"], values)
