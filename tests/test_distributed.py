"""Two real processes: the same run with and without the callback, and the same numbers as one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies import DeepSpeedStrategy as LightningDeepSpeedStrategy
from torch.nn import functional

from gmar_lightning import History
from gmar_lightning.arguments import ConfigurationError, check_strategy
from gmar_lightning.explain.training_step import StepReader
from gmar_lightning.monitor.explanation import explain_together
from gmar_lightning.monitor.probe import draw_probe
from gmar_lightning.monitor.settings import ProbeSettings
from tests.helpers.many_processes import DDP_ROWS
from tests.helpers.tiny import Classifier, loaders, run_and_digest, watcher

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder and the results of both processes; a deadlock ends in a timeout."""
    folder = tmp_path_factory.mktemp("two")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(find_free_network_port()),
        "WORLD_SIZE": "2",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.many_processes", str(folder)],
            cwd=Path(__file__).parent.parent,
            env={**environment, "LOCAL_RANK": str(rank)},
            stdout=(folder / f"output_{rank}.txt").open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank in (0, 1)
    ]
    try:
        codes = [process.wait(timeout=600) for process in processes]
    except subprocess.TimeoutExpired:
        codes = ["deadlock"]
    finally:
        for process in processes:
            process.kill()
    output = "\n".join((folder / f"output_{rank}.txt").read_text()[-3000:] for rank in (0, 1))
    assert codes == [0, 0], f"{codes}\n{output}"
    return folder, [json.loads((folder / f"results_{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", DDP_ROWS)
def test_the_run_is_the_same_on_both_processes(name: str, ran: Any) -> None:
    for results in ran[1]:
        assert results[name]["with"] == results[name]["without"]
    first, second = (results[name]["with"] for results in ran[1])
    assert first["optimizers"] == second["optimizers"]
    assert first["sample order"] != second["sample order"]  # it is the data that differs
    if name != "BatchNorm":
        assert first["weights and buffers"] == second["weights and buffers"]


@pytest.mark.parametrize("name", DDP_ROWS.keys() - {"failure on one process", "read off steps"})
def test_numbers_do_not_depend_on_the_number_of_processes(name: str, ran: Any) -> None:
    place = ran[0] / name.replace(" ", "_")
    record = History.load(place / "gmar").records
    assert len(record) >= 3
    assert not any(line.failure for line in record)
    module = DDP_ROWS[name][0]()
    module.load_state_dict(torch.load(place / "last.pt"))
    probe = draw_probe(loaders()[1], DDP_ROWS[name][2].get("num_images", 8))
    alone = explain_together(module, probe, ProbeSettings())
    # 4 digits and 8 bits are stored.
    np.testing.assert_allclose(record[-1].importance, alone.signals()["importance"], rtol=5e-4)
    probabilities = torch.from_numpy(alone.logits).softmax(-1).amax(-1)
    np.testing.assert_allclose(record[-1].probabilities, probabilities, rtol=5e-4)
    assert list(record[-1].predictions) == alone.logits.argmax(-1).tolist()
    maps = History.load(place / "gmar").heatmaps(record[-1].step)
    np.testing.assert_allclose(maps, alone.maps["gradient"], atol=2e-3 * alone.maps["gradient"].max())


def test_a_step_is_read_over_all_processes(ran: Any) -> None:
    place = ran[0] / "read_off_steps"
    record = History.load(place / "gmar").records
    assert [line.global_step for line in record] == [1, 2, 4, 6, 8]
    module = DDP_ROWS["read off steps"][0]()
    module.load_state_dict(torch.load(place / "first.pt"))
    data = loaders()[0].dataset
    rows = [data[index] for results in ran[1] for index in results["read off steps"]["first batch"]]
    reader = StepReader(module)
    with reader.watching():
        images, labels = (torch.stack([row[part] for row in rows]) for part in (0, 1))
        functional.cross_entropy(module(images), labels).backward()
    # one batch of all images says the same as two halves on two processes
    np.testing.assert_allclose(record[0].importance, reader.signals().importance, rtol=6e-4)


def test_failure_on_one_process_is_everyones_failure(ran: Any) -> None:
    record = History.load(ran[0] / "failure_on_one_process" / "gmar").records
    errors = [line.failure for line in record if line.failure]
    assert errors
    assert all("on process 1: RuntimeError: only here" in error for error in errors)
    assert len([line for line in record if line.importance is not None]) >= 2


@pytest.mark.parametrize("kind", ["fully_shard", "FullyShardedDataParallel"])
def test_sharded_model_gives_the_same_numbers(kind: str, ran: Any) -> None:
    for results in ran[1]:
        found = results[kind]
        np.testing.assert_allclose(found["sharded"], found["whole"], rtol=1e-5)
        assert found["maps"] < 1e-6
        assert found["layers"][0] == found["layers"][1]


@pytest.mark.parametrize("kind", ["fully_shard", "FullyShardedDataParallel"])
def test_one_block_is_whole_at_a_time(kind: str, ran: Any) -> None:
    """Counted at every operation, forward and backward; the model has three blocks."""
    assert [results[kind]["most whole"] for results in ran[1]] == [1, 1]


@pytest.mark.parametrize("kind", ["fully_shard", "FullyShardedDataParallel"])
def test_processes_may_be_out_of_step(kind: str, ran: Any) -> None:
    first, second = (results[kind] for results in ran[1])
    assert first["unequal"] < 1e-5
    assert second["unequal"] < 1e-5
    assert first["failure"] == "ProbeError: on process 1: RuntimeError: only here"
    assert second["failure"] == "RuntimeError: only here"


@pytest.mark.parametrize("kind", ["fully_shard", "FullyShardedDataParallel"])
def test_sharded_layers_that_are_computed_anew(kind: str, ran: Any) -> None:
    assert all(results[kind]["checkpointed"] < 1e-6 for results in ran[1])


@pytest.mark.parametrize("kind", ["fully_shard", "FullyShardedDataParallel"])
def test_gates_of_sharded_blocks_are_looked_behind(kind: str, ran: Any) -> None:
    assert all("mixed outside the attention" in results[kind]["closed gate"] for results in ran[1])


def test_the_precision_of_sharded_blocks_is_their_policy(ran: Any) -> None:
    for results in ran[1]:
        sharded, whole = results["half precision"]
        np.testing.assert_allclose(sharded, whole, rtol=2e-2)


def test_training_under_lightnings_strategy_for_fully_shard_is_the_same(ran: Any) -> None:
    for results in ran[1]:
        assert results["model_parallel"]["with"] == results["model_parallel"]["without"]
    lines = History.load(ran[0] / "model_parallel" / "gmar").records
    assert len(lines) >= 3
    assert not any(line.failure for line in lines)


def test_tensor_parallelism_is_refused_by_name(ran: Any) -> None:
    for results in ran[1]:
        said = results["tensor parallel"]
        assert said.startswith(
            "UnsupportedModelError: blocks.0.mlp.fc1.weight is split between processes by tensor"
        )


class DeepSpeedStrategy(DDPStrategy):
    """Stands for Lightning's, which cannot be made without DeepSpeed; that one is a DDPStrategy, too."""


@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        (DeepSpeedStrategy(), "under DeepSpeedStrategy: its engine owns"),
        (type("Tuned", (DeepSpeedStrategy,), {})(), "under Tuned: its engine owns"),
        (ModelParallelStrategy(1, 2), "under ModelParallelStrategy: tensor_parallel_size=2"),
        (ModelParallelStrategy(), "tensor_parallel_size='auto'"),
    ],
)
def test_a_strategy_that_cuts_layers_up_is_refused_by_name(strategy: Any, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        check_strategy(strategy)


def test_lightnings_own_class_of_that_name_is_meant() -> None:
    assert issubclass(LightningDeepSpeedStrategy, DDPStrategy)
    assert LightningDeepSpeedStrategy.__name__ == "DeepSpeedStrategy"
    for strategy in (DDPStrategy(), ModelParallelStrategy(2, 1)):
        check_strategy(strategy)


@pytest.mark.parametrize("kind", ["fully_shard", "FullyShardedDataParallel"])
def test_sharded_training_is_the_same_with_probes_between_the_steps(kind: str, ran: Any) -> None:
    for results in ran[1]:
        with_probes, without = results[f"training {kind}"]
        assert with_probes == without


def test_both_processes_learn_of_an_error_and_judge_it_alike(ran: Any) -> None:
    first, second = (results["error"] for results in ran[1])
    assert first == {"raised": "ProbeError", "said": "on process 1: ValueError: bad", "refused": True}
    assert second["raised"] == "ValueError"


def test_out_of_memory_on_one_process_halves_the_batch_on_both(ran: Any) -> None:
    for results in ran[1]:
        assert results["memory"] == {"micro_batch_size": 1, "halved": True}


class Sharded(Classifier):
    """Shards its blocks under `model_parallel`; `fsdp` wraps by itself."""

    def configure_model(self) -> None:
        if getattr(self, "device_mesh", None) is not None:
            from torch.distributed.fsdp import fully_shard

            for block in self.net.blocks:
                fully_shard(block, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


class Compiled(Classifier):
    def __init__(self):
        super().__init__(drop_rate=0.1)
        self.net = torch.compile(self.net)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(
    ("module", "settings"),
    [
        (Classifier, {"precision": "bf16-mixed"}),
        (Compiled, {"precision": "bf16-mixed"}),
        (Classifier, {"precision": "16-mixed"}),
        (Classifier, {"strategy": "fsdp", "precision": "bf16-mixed"}),
        (Sharded, {"strategy": "model_parallel", "precision": "bf16-true"}),
    ],
)
def test_the_run_is_the_same_on_a_gpu(module: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    settings = {"accelerator": "cuda", "devices": 1, **settings}
    with_it, _, _ = run_and_digest(tmp_path / "a", module, loaders, lambda: [watcher(tmp_path)], **settings)
    without, _, _ = run_and_digest(tmp_path / "b", module, loaders, **settings)
    assert with_it == without
    assert len(History.load(tmp_path / "gmar").records) >= 4
