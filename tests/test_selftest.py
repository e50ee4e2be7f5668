"""How probes are taken where putting back does not work: on a copy of the model, or not at all."""

from __future__ import annotations

import contextlib
import multiprocessing
import random
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gmar_lightning import History, UnsupportedModelError, gmar
from gmar_lightning.monitor.record import ProbeRecord
from gmar_lightning.monitor.say import SayOnce
from gmar_lightning.monitor.selftest import SelfTest
from tests.helpers.networks import ViT, pictures, seeded
from tests.helpers.tiny import Classifier, fit, loaders, run_and_digest, watcher


class OneWay(random.Random):
    """A generator that tells its state and never goes back; a copy of it is another one."""

    def setstate(self, state: Any) -> None:
        raise RuntimeError("no way back")

    def __deepcopy__(self, memo: Any) -> OneWay:
        twin = OneWay(0)
        random.Random.setstate(twin, self.getstate())
        return twin

    def __reduce__(self) -> Any:
        raise TypeError("not to be pickled")


OF_ALL = OneWay(1)


class Draws(Classifier):
    """Each forward draws a number that the logits depend on."""

    def __init__(self, **kept: Any) -> None:
        super().__init__()
        self.way = OneWay(1)
        vars(self).update(kept)

    def draw(self) -> float:
        return self.way.random()

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images) * (1 + 0.1 * self.draw())


class DrawsFromAll(Draws):
    def __init__(self) -> None:
        super().__init__()
        del self.way

    def draw(self) -> float:
        return OF_ALL.random()


class DrawsLive(Draws):
    def __init__(self) -> None:
        super().__init__()
        self.stream = (number / 100 for number in range(10_000))

    def draw(self) -> float:
        return next(self.stream)


class CutOff(Classifier):
    """A linear probe on features that left torch: no switch brings their gradient back."""

    def forward(self, images: Tensor) -> Tensor:
        net: Any = self.net
        features = net.forward_head(net.forward_features(images), pre_logits=True)
        return net.head(torch.from_numpy(features.detach().numpy().copy()))


class Seldom(Draws):
    """Holds what cannot be put back, and leaves it alone."""

    def draw(self) -> float:
        return 0.5


def trained(folder: Path, make: Callable[[], Any], **changes: Any) -> tuple[bool, list[str], Any]:
    """Train with the callback and without; whether both are the same, what it said, and its records."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with_it, trainer, _ = run_and_digest(
            folder / "a", make, loaders, lambda: [watcher(folder, **{"on_error": "warn", **changes})], max_epochs=1
        )  # fmt: skip
    said = [str(w.message) for w in caught if str(w.message).startswith("GMARCallback")]
    without, _, _ = run_and_digest(folder / "b", make, loaders, max_epochs=1)
    records = History.load(folder / "gmar").records
    return with_it == without, [s for s in said if "takes numbers only" not in s], (records, trainer)


def test_what_cannot_be_put_back_is_explained_on_a_copy(tmp_path: Path) -> None:
    same, said, (records, trainer) = trained(tmp_path, Draws)
    assert same
    assert said == [
        "GMARCallback: the forward changes Draws.way, which cannot be put back; a copy of the model is explained"
    ]
    assert [record.failure for record in records] == [None] * 4
    report = records[0].verification
    assert report is not None
    assert (report["mode"], report["not_restored"]) == ("by copy", [])
    # The copy is the model of now: its scores do not depend on the factor but for the factor itself.
    module = trainer.lightning_module
    probe = trainer.callbacks[0].watches[0].prober.probe
    found = gmar(module.net, probe.images)
    assert records[-1].importance is not None
    factors = records[-1].importance / found.importance.mean(0).numpy()
    np.testing.assert_allclose(factors, factors[0, 0], rtol=1e-3)  # the record has 4 digits
    assert 1 < factors[0, 0] < 1.1


def test_what_a_copy_shares_with_the_model_ends_the_probes(tmp_path: Path) -> None:
    _, said, (records, trainer) = trained(tmp_path, DrawsFromAll)
    assert trainer.global_step == 8
    assert len(said) == 2
    assert said[0].endswith("for good; from here on a copy of the model is explained")
    assert "OF_ALL for good, though on a copy of the model; no more probes are taken in this run" in said[1]
    assert [record.verification["mode"] for record in records] == ["by copy", "refused"]
    assert (tmp_path / "gmar" / "report.html").is_file()


def test_a_model_that_cannot_be_copied_ends_the_probes(tmp_path: Path) -> None:
    _, said, (records, trainer) = trained(tmp_path, lambda: Draws(lock=threading.Lock()))
    assert trainer.global_step == 8
    assert len(said) == 2
    assert "the probe at step 0 changed Draws.way for good" in said[0]
    assert "the model cannot be copied (TypeError: cannot pickle '_thread.lock' object); no more" in said[1]
    assert len(records) == 1


def test_a_live_generator_ends_the_probes_and_training_misses_nothing(tmp_path: Path) -> None:
    same, said, (records, _) = trained(tmp_path, DrawsLive)
    assert same
    assert len(said) == 2
    assert "the probe at step 0 failed, training goes on (LiveIteratorError" in said[0]
    assert (
        "the forward draws from DrawsLive.stream, which can be neither rewound nor copied; no more" in said[1]
    )
    assert [record.verification["mode"] for record in records] == ["refused"]
    with pytest.raises(UnsupportedModelError, match="a live iterator"):
        fit(tmp_path, DrawsLive(), loaders(), callbacks=[watcher(tmp_path / "c")])


def test_a_linear_probe_beyond_help_trains_on_without_pictures(tmp_path: Path) -> None:
    same, said, (records, _) = trained(tmp_path, CutOff)
    assert same
    assert len(said) == 2
    assert "the probe at step 0 failed, training goes on (CutOffError" in said[0]
    assert len([record for record in records if record.failure]) == 3
    with pytest.raises(UnsupportedModelError):
        fit(tmp_path, CutOff(), loaders(), callbacks=[watcher(tmp_path / "c")])


def test_what_is_never_written_costs_no_copy(tmp_path: Path) -> None:
    same, said, (records, trainer) = trained(tmp_path, Seldom)
    assert same
    assert not said
    assert records[0].verification["mode"] == "same"
    assert not trainer.callbacks[0].watches[0]._taker.selftest._twins


@pytest.mark.slow
def test_a_resumed_run_does_not_try_again_what_left_a_trace(tmp_path: Path) -> None:
    for make, mode, said in (
        (Draws, "by copy", None),
        (DrawsFromAll, "refused", r"OF_ALL for good; no more probes"),
    ):
        folder = tmp_path / mode
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer, _ = fit(
                folder, make(), loaders(16), callbacks=[watcher(folder, on_error="warn")], max_epochs=1
            )
        trainer.save_checkpoint(folder / "a.ckpt")
        again, before = watcher(folder, on_error="warn"), OF_ALL.getstate()
        with pytest.warns(UserWarning, match=said) if said else contextlib.nullcontext():
            trainer, _ = fit(
                folder, make(), loaders(16), callbacks=[again], max_epochs=2, ckpt_path=str(folder / "a.ckpt")
            )
        assert again.watches[0]._taker.selftest.mode == mode
        assert trainer.global_step == 8
        if mode == "refused":
            expected = OneWay(1)
            random.Random.setstate(expected, before)
            _ = [expected.random() for _ in range(2 + 4 + 2)]  # sanity check, one epoch, validation
            assert OF_ALL.getstate() == expected.getstate()


@pytest.mark.slow
def test_a_large_tensor_that_is_no_buffer(tmp_path: Path) -> None:
    """More than 256 MiB are not copied beside the model; a deep copy is made where the forward writes them."""

    class Bank(Classifier):
        def __init__(self, buffer: bool) -> None:
            super().__init__()
            bank = torch.zeros(65 << 20)  # 260 MiB
            self.register_buffer("bank", bank, persistent=False) if buffer else vars(self).update(bank=bank)

        def forward(self, images: Tensor) -> Tensor:
            bank: Any = self.bank
            bank += 1
            return self.net(images) + 1e-3 * bank[0]

    for buffer, mode in ((False, "by copy"), (True, "restored")):
        same, _, (records, _) = trained(
            tmp_path / mode, lambda buffer=buffer: Bank(buffer), every_n_train_steps=8
        )
        assert same
        assert records[0].verification["mode"] == mode


CONTEXT = multiprocessing.get_context("forkserver")


class DrawsPerhaps(ViT):
    """Has state that cannot be put back, and draws from it where it is told to."""

    draws = False

    def forward(self, images: Tensor) -> Tensor:
        if self.draws:
            self.way.random()
        return super().forward(images)


def _one_of_two(rank: int, folder: Path) -> None:
    """Process 1 alone has state that cannot be put back; both must come to the same mode."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model: Any = seeded(DrawsPerhaps)
    said = list[str]()
    # Read from the module itself, so that a copy of the model draws from a copy of it.
    model.way, model.draws = OneWay(1), rank == 1
    test = SelfTest(True, SayOnce(said.append))

    def probe(used: Any) -> ProbeRecord:
        gmar(used, pictures(1))
        return ProbeRecord(0, 0)

    modes = []
    for _ in range(3):
        test.take(probe, model, {"ViT": model})
        modes.append(test.mode)
    torch.save([modes, said], folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_all_processes_go_the_same_way(tmp_path: Path) -> None:
    processes = [CONTEXT.Process(target=_one_of_two, args=(rank, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
        assert process.exitcode == 0
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first == second
    assert first[0][0] == "by copy"
