"""Kinds of training, each run with the callback and without it: the same, bit for bit.

With `GMAR_TABLE=file` the slow test writes the table of `docs/guarantee.md`.
"""

from __future__ import annotations

import dataclasses
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.profilers import SimpleProfiler
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.data import DataLoader, SequentialSampler

from gmar_lightning import History
from tests.helpers.tiny import CLASSES, SIZE, Classifier, Images, images_of, loaders, run_and_digest, watcher
from tests.test_guarantee import WRITES, Stateful, everything
from tests.test_undisturbed import ROWS

AMONG_ALL = np.random.default_rng(11)


class Keeps(Classifier):
    """What a forward of `Stateful` writes decides the logits of the next, so that any trace shows."""

    def __init__(self, name: str):
        super().__init__()
        self.state = Stateful(WRITES[name])
        self.state.number = 1
        self.state.ticking = 0

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            self.state.act(self.state)
        return self.net(images) + 1e-3 * (int(_digest(self.state), 16) % 97)


def _digest(state: Any) -> str:
    import hashlib

    # Addresses differ between two runs, everything else may not.
    return hashlib.sha256(repr(_values(state)).encode()).hexdigest()


def _values(state: Any) -> Any:
    return [
        len(state.deque), state.deque[-1], sorted(state.counter.items()), list(state.ordered),
        len(state.default["y"]),
        state.nested["a"][0]["b"], state.nested["a"][1], state.array.tolist(), state.arrays[0].tolist(),
        state.tensors[0].tolist(), state.config.scale, state.config.nested, state.space.count, state.slotted.count,
        state.calls, len(state.shared), state.memory.tolist()[:3], state.head.weight.sum().item(), state.number,
        state.own_python.getstate()[1][:3], state.own_numpy.bit_generator.state["state"],
        state.own_torch.get_state().sum().item(),
        len(state.bytes), len(state.compact), state.enclosed(), repr(state.ticks),
    ]  # fmt: skip


class Changed(Classifier):
    """The plain classifier, after something was done to its network."""

    def __init__(self, change: Callable[[nn.Module], None], **options: Any):
        super().__init__(**options)
        change(self.net)


def scripted(net: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net.head = nn.Sequential(torch.jit.script(nn.BatchNorm1d(16)), net.head)


def traced(net: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net.head = torch.jit.trace(net.head, torch.zeros(2, 16))


def lazy(net: Any) -> None:
    net.head = nn.Sequential(nn.LazyBatchNorm1d(), nn.LazyLinear(CLASSES))


def spectral(net: Any) -> None:
    parametrizations.spectral_norm(net.head)


def weight_norm(net: Any) -> None:
    parametrizations.weight_norm(net.blocks[0].mlp.fc1)


def pruned(net: Any) -> None:
    prune.l1_unstructured(net.blocks[0].mlp.fc1, "weight", 0.3)


def observed(net: Any) -> None:
    from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver

    net.head = nn.Sequential(FakeQuantize(MovingAverageMinMaxObserver, 0, 255), net.head)


class Logs(Classifier):
    def forward(self, images: Tensor) -> Tensor:
        if self.logger is not None:
            self.logger.log_metrics({"forward": 1.0})
        return self.net(images)


class Transfers(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.own = np.random.default_rng(4)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] + float(self.own.normal()), *batch[1:]]


class Frozen(Classifier):
    """A linear probe."""

    def __init__(self, detach: bool):
        super().__init__()
        self.detach = detach

    def forward(self, images: Tensor) -> Tensor:
        if self.detach:
            return self.net.head(
                self.net.forward_head(self.net.forward_features(images), pre_logits=True).detach()
            )
        with torch.no_grad():
            features = self.net.forward_head(self.net.forward_features(images), pre_logits=True)
        return self.net.head(features)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.head.parameters(), 0.1)


class Teacher(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Linear(CLASSES, CLASSES).requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        logits = self.net(images)
        with torch.no_grad():
            self.teacher.weight.lerp_(logits.T @ logits, 0.01)
        return logits + 1e-3 * self.teacher(logits.detach())


class Batches(Classifier):
    """Hands the parts of a batch on in the order (image, label, index)."""

    def __init__(self, order: Callable[[Any], Any]):
        super().__init__()
        self.order_of = order

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(self.order_of(batch), batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(self.order_of(batch), batch_idx)


@dataclasses.dataclass
class Sample:
    picture: Tensor
    label: Tensor
    index: Tensor


def as_samples(items: list[Any]) -> Sample:
    images, labels, indices = zip(*items, strict=True)
    return Sample(torch.stack(images), torch.stack(labels), torch.tensor(indices))


def as_index_first(items: list[Any]) -> list[Tensor]:
    images, labels, indices = zip(*items, strict=True)
    return [torch.stack(images), torch.tensor(indices), torch.stack(labels)]


class Lines(Images):
    """Reads numbers from an open file, under a lock, and from a generator that everything shares."""

    def __init__(self, kind: str):
        super().__init__(32)
        self.kind = kind
        if kind == "file":
            self.stream = open(__file__)  # noqa: SIM115
        if kind == "lock":
            self.lock, self.asked = threading.Lock(), 0

    def __getitem__(self, index: int) -> Any:
        image, label, position = super().__getitem__(index)
        if self.kind == "file":
            self.stream.seek(0, 0) if self.stream.tell() > 3000 else None
            image = image + 1e-2 * len(self.stream.readline())
        if self.kind == "lock":
            with self.lock:
                self.asked += 1
                image = image + 1e-2 * self.asked
        if self.kind == "module":
            image = image + float(AMONG_ALL.normal())
        return image, label, position


def both(kind: str) -> tuple[DataLoader, DataLoader]:
    AMONG_ALL.bit_generator.state = np.random.default_rng(11).bit_generator.state
    data = Lines(kind)
    return DataLoader(data, 4, shuffle=True), DataLoader(data, 8)


class Broken(Images):
    def __getitem__(self, index: int) -> Any:
        if index == 0:
            raise OSError("truncated")
        return super().__getitem__(index)


def never_sampled() -> tuple[DataLoader, DataLoader]:
    data = Broken(16)
    return loaders()[0], DataLoader(data, 8, sampler=list(range(8, 16)))


class Own:
    """No DataLoader, and iterates."""

    def __iter__(self) -> Iterator[Any]:
        for start in (0, 8):
            yield images_of(8, start), torch.arange(8) % CLASSES, torch.arange(8)


class FromModule(Classifier):
    def train_dataloader(self) -> DataLoader:
        return DataLoader(Images(), 4, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        torch.rand(1), np.random.rand()
        return DataLoader(Images(16, 1), 8, sampler=SequentialSampler(Images(16, 1)))


@dataclass
class Kind:
    """One kind of training.

    Attributes:
        module: Makes it.
        data: Makes its data.
        trainer: Arguments of the trainer.
        mode: What the self-test finds; None where any will do.
    """

    module: Callable[[], LightningModule] = Classifier
    data: Callable[[], Any] = loaders
    trainer: dict[str, Any] = dataclasses.field(default_factory=dict)
    mode: str | None = "same"


STATE = {f"state: {name}": Kind(lambda name=name: Keeps(name), mode=None) for name in WRITES}
# A write that changes nothing the second time (after the sanity check of validation) is none at the first probe.
SEEN = ("attribute", "deque", "class attribute", "buffer in place", "weights through .data", "module globals")
STATE.update({f"state: {name}": Kind(lambda name=name: Keeps(name), mode="restored") for name in SEEN})
OTHERS = {
    "a scripted submodule": Kind(lambda: Changed(scripted)),
    "a traced submodule": Kind(lambda: Changed(traced)),
    "a lazy head with batch normalisation": Kind(lambda: Changed(lazy)),
    "spectral norm": Kind(lambda: Changed(spectral)),
    "weight norm": Kind(lambda: Changed(weight_norm)),
    "pruning": Kind(lambda: Changed(pruned), mode=None),
    "quantisation-aware training": Kind(lambda: Changed(observed), mode="restored"),
    "a forward that uses self.logger": Kind(Logs),
    "a transfer hook with a generator": Kind(Transfers),
    "a linear probe under no_grad": Kind(lambda: Frozen(False)),
    "a linear probe on detached features": Kind(lambda: Frozen(True)),
    "a teacher updated in the forward": Kind(Teacher, mode="restored"),
    "batches (image, index, label)": Kind(
        lambda: Batches(lambda b: (b[0], b[2], b[1])), lambda: loaders(collate_fn=as_index_first)
    ),
    "dataclass batches": Kind(
        lambda: Batches(lambda b: (b.picture, b.label, b.index)), lambda: loaders(collate_fn=as_samples)
    ),
    "a data set with an open file": Kind(data=lambda: both("file")),
    "a data set with a lock": Kind(data=lambda: both("lock")),
    "a data set with a generator of its module": Kind(data=lambda: both("module")),
    "a sample that cannot be read and is never drawn": Kind(data=never_sampled),
    "a loader that is no DataLoader": Kind(data=lambda: (loaders()[0], Own())),
    "a val_dataloader method that draws": Kind(FromModule, lambda: None),
    "gradient clipping by norm": Kind(trainer={"gradient_clip_val": 0.1}),
    "gradient clipping by value": Kind(
        trainer={"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}
    ),
    "a profiler": Kind(trainer={"profiler": SimpleProfiler()}),
    "anomaly detection": Kind(trainer={"detect_anomaly": True, "max_epochs": 1}),
    "no sanity check": Kind(trainer={"num_sanity_val_steps": 0}),
    "limit_val_batches": Kind(trainer={"limit_val_batches": 1}),
    "limit_train_batches": Kind(trainer={"limit_train_batches": 3}),
    "deterministic algorithms": Kind(trainer={"deterministic": True, "max_epochs": 1}),
    "validation every second epoch": Kind(trainer={"check_val_every_n_epoch": 2}),
    "overfit_batches": Kind(trainer={"overfit_batches": 2}),
    "mean pooling": Kind(lambda: Classifier(global_pool="avg", class_token=False)),
    "register tokens": Kind(lambda: Classifier(reg_tokens=2)),
    "layer scale": Kind(lambda: Classifier(init_values=1e-2)),
    "query and key norm": Kind(lambda: Classifier(qk_norm=True)),
    "an attention pool": Kind(lambda: Classifier(global_pool="map", class_token=False)),
    "one layer": Kind(lambda: Classifier(depth=1)),
    "dynamic image size": Kind(lambda: Classifier(dynamic_img_size=True)),
    "images of one channel": Kind(
        lambda: Batches(lambda b: (b[0][:, :1].expand(-1, 3, -1, -1), *b[1:])), mode="same"
    ),
    "dropout of positions": Kind(lambda: Classifier(pos_drop_rate=0.2)),
    "dropout of projections": Kind(lambda: Classifier(proj_drop_rate=0.2)),
}
KINDS = {**STATE, **OTHERS}
FAST = [*OTHERS, *[f"state: {name}" for name in list(WRITES)[::9]]]


def trained_alike(name: str, kind: Kind, folder: Path) -> str:
    """Train with and without; returns how probes were taken."""
    settings = {"max_epochs": 1, **kind.trainer}
    if kind.trainer.get("profiler"):
        settings["profiler"] = SimpleProfiler()
    reset()
    with_it, trainer, rows = run_and_digest(
        folder / "a", kind.module, kind.data, lambda: [watcher(folder)], **settings
    )
    first = everything(trainer.lightning_module.state) if name in STATE else ""
    reset()
    without, trainer, _ = run_and_digest(folder / "b", kind.module, kind.data, **settings)
    assert with_it == without
    del first
    records = History.load(folder / "gmar").records
    assert records
    assert not any(record.failure for record in records)
    assert rows.of_gmar()
    report = records[0].verification
    assert report is not None
    return report["mode"]


def reset() -> None:
    from tests import test_guarantee

    Stateful.calls, test_guarantee.Config.step, test_guarantee.COUNT = 0, 0, 0
    Stateful.shared.clear()
    test_guarantee.TALLY["calls"] = 0
    test_guarantee.STREAM.bit_generator.state = np.random.default_rng(3).bit_generator.state
    if hasattr(Stateful, "late_attribute"):
        del Stateful.late_attribute


@pytest.mark.parametrize("name", FAST)
def test_training_is_the_same(name: str, tmp_path: Path) -> None:
    mode = trained_alike(name, KINDS[name], tmp_path)
    assert KINDS[name].mode in (None, mode)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in KINDS if name not in FAST])
def test_training_is_the_same_slow(name: str, tmp_path: Path) -> None:
    mode = trained_alike(name, KINDS[name], tmp_path)
    assert KINDS[name].mode in (None, mode)


@pytest.mark.slow
def test_the_table(tmp_path: Path) -> None:
    lines = ["| kind of training | probes | test |", "|---|---|---|"]
    for index, (name, kind) in enumerate(KINDS.items()):
        mode = trained_alike(name, kind, tmp_path / str(index))
        lines.append(f"| {name} | {mode} | `test_guarantee_runs.py` |")
    lines += [f"| {name} | same or restored | `test_undisturbed.py` |" for name in ROWS]
    assert len(lines) - 2 >= 115
    if os.environ.get("GMAR_TABLE"):
        Path(os.environ["GMAR_TABLE"]).write_text("\n".join(lines) + "\n")


assert SIZE
