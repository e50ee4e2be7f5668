"""What goes wrong in a probe: training finishes, one warning says cause and step, the record says what is missing."""

from __future__ import annotations

import ctypes
import os
import resource
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from gmar_lightning import History
from gmar_lightning.monitor.probe import ProbeBatch
from gmar_lightning.monitor.record import ProbeRecord
from tests.helpers.tiny import CLASSES, Classifier, Images, Rows, fit, images_of, loaders, watcher


def run(folder: Path, module: Any = None, callbacks: Any = (), **changes: Any) -> tuple[list[str], Any, Rows]:
    """Train with a probe at every second step; returns what was said by the callback."""
    settings = {"every_n_train_steps": 2, "on_error": "warn", **changes}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer, rows = fit(
            folder, module or Classifier(), loaders(), callbacks=[watcher(folder, **settings), *callbacks]
        )
    assert trainer.global_step == 16  # training finished
    said = [str(warning.message) for warning in caught if "GMARCallback" in str(warning.message)]
    return [sentence for sentence in said if "takes numbers only" not in sentence], trainer, rows


def lines(folder: Path) -> list[ProbeRecord]:
    return History.load(folder / "gmar").records


class InProbe:
    """Acts on the forwards of probes, not on those of training and validation."""

    def __init__(self, act: Callable[[int, Any], Any]):
        self.act, self.forwards = act, ctypes.c_int(0)  # memory that a probe does not put back

    def __call__(self, module: nn.Module, inputs: Any) -> Any:
        if torch.is_grad_enabled() and not module.training:
            self.forwards.value += 1
            return self.act(self.forwards.value, inputs[0])
        return None


def hooked(act: Callable[[int, Any], Any]) -> Classifier:
    torch.manual_seed(3)
    module = Classifier()
    module.net.blocks[0].register_forward_pre_hook(InProbe(act))
    return module


class At(Callback):
    """Does something once, before the given step."""

    def __init__(self, step: int, action: Callable[[Any, Any], None]):
        self.step, self.action = step, action

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            self.action(trainer, pl_module)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinite_logits(value: float, tmp_path: Path) -> None:
    def spoil(trainer: Any, module: Any) -> None:
        with torch.no_grad():
            module.net.head.weight.fill_(value)

    said, _trainer, rows = run(tmp_path, callbacks=[At(5, spoil)])
    assert len([sentence for sentence in said if "NaN or infinite at step 5" in sentence]) == 1
    assert len(said) == 1, said
    record = lines(tmp_path)
    assert [event.kind for line in record for event in line.events].count("nonfinite") >= 1
    assert record[1].importance[0, 0] > 0
    assert len(rows.of_gmar()) == len(record) == 9


def test_infinite_gradients_with_finite_logits(tmp_path: Path) -> None:
    class Slope(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logits: Tensor) -> Tensor:
            return logits.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return grads[0] * torch.inf

    class Root(Classifier):
        """The probe's gradients are infinite from the sixth step on."""

        def forward(self, images: Tensor) -> Tensor:
            logits = self.net(images)
            return Slope.apply(logits) if not self.training and self.global_step >= 6 else logits

    said, _, _ = run(tmp_path, Root())
    assert len(said) == 1
    assert "step 5" in said[0]


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("can't allocate memory")],
)
def test_out_of_memory_halves_the_micro_batch(error: Exception, tmp_path: Path) -> None:
    def fill(forwards: int, images: Tensor) -> None:
        if len(images) > 2:
            raise error

    said, _, _ = run(tmp_path, hooked(fill))
    assert len(said) == 1, said
    assert "step 0 ran out of memory" in said[0]
    assert "takes 2 image(s) at a time" in said[0]
    plain = tmp_path / "plain"
    run(plain, hooked(lambda forwards, images: None))
    assert not any(line.failure for line in lines(tmp_path))
    first, whole = lines(tmp_path)[0], lines(plain)[0]
    np.testing.assert_allclose(first.importance, whole.importance, rtol=1e-5)
    assert len(lines(tmp_path)) == 9


def test_out_of_memory_with_one_image_is_a_failed_probe(tmp_path: Path) -> None:
    def fill(forwards: int, images: Tensor) -> None:
        raise MemoryError

    said, _, _ = run(tmp_path, hooked(fill))
    assert len(said) == 2
    assert "probe at step 0 failed" in said[0]
    assert "out of memory with one image at a time" in said[0]
    assert said[1].endswith("3 probes in a row failed; no more probes in this run")
    assert [line.failure is None for line in lines(tmp_path)] == [False] * 3


def test_real_memory_runs_out(tmp_path: Path) -> None:
    def fill(forwards: int, images: Tensor) -> None:
        if len(images) > 4:
            torch.empty(1 << 60)

    said, _, _ = run(tmp_path, hooked(fill))
    assert len(said) == 1
    assert "takes 4 image(s) at a time" in said[0]


def test_three_failures_in_a_row_switch_it_off_and_a_success_starts_the_count_again(tmp_path: Path) -> None:
    def fail(forwards: int, images: Tensor) -> None:
        if forwards not in (1, 4):
            raise RuntimeError("no luck")

    def once_per_probe() -> Classifier:
        module = Classifier()
        last, count = ctypes.c_int(-1), ctypes.c_int(0)  # memory that a probe does not put back

        def act(forwards: int, images: Tensor) -> None:
            count.value += last.value != module.trainer.global_step
            last.value = module.trainer.global_step
            fail(count.value, images)

        module.net.blocks[0].register_forward_pre_hook(InProbe(act))
        return module

    said, _, _ = run(tmp_path, once_per_probe())
    assert said == [
        "GMARCallback: the probe at step 1 failed, training goes on (RuntimeError: no luck)",
        "GMARCallback: 3 probes in a row failed; no more probes in this run",
    ]
    assert [line.failure is None for line in lines(tmp_path)] == [
        True,
        False,
        False,
        True,
        False,
        False,
        False,
    ]


def test_forward_that_changes_its_output_type_in_mid_run(tmp_path: Path) -> None:
    class Changing(Classifier):
        def forward(self, images: Tensor) -> Any:
            logits = self.net(images)
            return (
                [logits] if torch.is_grad_enabled() and not self.training and self.global_step > 4 else logits
            )

    said, _, _ = run(tmp_path, Changing())
    assert len(said) == 2
    assert "the probe at step 5 failed, training goes on (UnsupportedModelError: the forward" in said[0]
    assert "3 probes in a row failed" in said[1]


def test_labels_missing_in_mid_run(tmp_path: Path) -> None:
    def forget(trainer: Any, module: Any) -> None:
        prober = trainer.callbacks[0].watches[0].prober
        prober.probe = ProbeBatch(prober.probe.images, None)

    said, _, _ = run(tmp_path, callbacks=[At(5, forget)], target="label")
    assert len(said) == 2
    assert "the probe at step 5 failed" in said[0]
    assert 'target="label" needs labels' in said[0]


def test_labels_missing_in_part_of_the_validation_set(tmp_path: Path) -> None:
    class Partly(Images):
        def __getitem__(self, index: int) -> Any:
            return (self.images[index],) if index == 5 else (self.images[index], self.classes[index])

    class Plain(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self(batch[0])

    def images_only(items: list[Any]) -> list[Tensor]:
        parts = [torch.stack([item[0] for item in items])]
        full = all(len(item) == 2 for item in items)
        return [*parts, torch.stack([item[1] for item in items])] if full else parts

    from torch.utils.data import DataLoader

    val = DataLoader(Partly(8), 4, collate_fn=images_only)
    fit(tmp_path, Plain(), (loaders(16)[0], val), callbacks=[watcher(tmp_path)])
    assert History.load(tmp_path / "gmar").run["labels"] is None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_full_disk(tmp_path: Path) -> None:
    def fill_disk(trainer: Any, module: Any) -> None:
        # Every write to this device fails as it does on a full disk.
        record = tmp_path / "gmar" / "history.jsonl"
        record.rename(tmp_path / "before.jsonl")
        record.symlink_to("/dev/full")

    said, _, rows = run(tmp_path, callbacks=[At(5, fill_disk)])
    assert len(said) == 1, said
    assert "No space left on device" in said[0] or "Invalid argument" in said[0]
    assert "step 5" in said[0]
    assert len(rows.of_gmar()) == 9  # the logger still gets every probe
    assert len((tmp_path / "before.jsonl").read_text().splitlines()) == 3


def test_file_size_limit_tears_no_line(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(trainer: Any, module: Any) -> None:
        size = (tmp_path / "gmar" / "history.jsonl").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, hard))

    try:
        said, _, _ = run(tmp_path, callbacks=[At(5, limit)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len([sentence for sentence in said if "record failed" in sentence]) == 1, said
    assert len(lines(tmp_path)) == 3
    assert [line.global_step for line in lines(tmp_path)] == [0, 2, 4]


def test_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "gmar").write_text("in the way")
    said, _, rows = run(tmp_path)
    assert len(said) == 1
    assert "no record can be written" in said[0]
    assert len(rows.of_gmar()) == 9
    assert (tmp_path / "gmar").read_text() == "in the way"


@pytest.mark.skipif(os.getuid() == 0, reason="root writes everywhere")
def test_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        said, _, rows = run(tmp_path)
    finally:
        tmp_path.chmod(0o700)
    assert len(said) == 1
    assert len(rows.of_gmar()) == 9


def test_damaged_record_does_not_keep_a_run_from_going_on(tmp_path: Path) -> None:
    first = watcher(tmp_path)
    trainer, _ = fit(tmp_path, Classifier(), loaders(16), callbacks=[first], max_epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    (tmp_path / "gmar" / "run.json").write_text("{")
    with pytest.warns(UserWarning, match="not valid JSON"):
        again, _ = fit(
            tmp_path, Classifier(), loaders(16), callbacks=[watcher(tmp_path)], max_epochs=2,
            ckpt_path=str(tmp_path / "a.ckpt"),
        )  # fmt: skip
    assert again.global_step == 8


def test_logger_that_raises(tmp_path: Path) -> None:
    class Broken(Rows):
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            if "gmar/collapsed_heads" in metrics:
                raise ConnectionError("server gone")
            super().log_metrics(metrics, step)

    good, broken = Rows(), Broken()
    with pytest.warns(UserWarning, match="GMARCallback") as caught:
        trainer, _ = fit(
            tmp_path, Classifier(), loaders(), callbacks=[watcher(tmp_path)], logger=[broken, good]
        )
    said = [str(warning.message) for warning in caught if "server gone" in str(warning.message)]
    assert len(said) == 1
    assert "Broken failed" in said[0]
    assert "step 0" in said[0]
    assert trainer.global_step == 16
    assert len(good.of_gmar()) == len(lines(tmp_path)) == 7


@pytest.mark.parametrize("channels", [2, 5])
def test_images_that_no_camera_takes(channels: int, tmp_path: Path) -> None:
    module = Classifier(in_chans=channels)
    module.forward = lambda images: module.net(images[:, :1].expand(-1, channels, -1, -1))
    probe = torch.randn(4, channels, 16, 16), torch.arange(4) % CLASSES
    run(tmp_path, module, probe_batch=probe)
    assert len(lines(tmp_path)) == 9


def test_image_that_cannot_be_encoded(tmp_path: Path) -> None:
    images = torch.full((4, 3, 16, 16), torch.nan)
    said, _, _ = run(tmp_path, probe_batch=(images, torch.arange(4)))
    assert len(lines(tmp_path)) == 9
    assert len(said) == 1  # NaN in, NaN out


def test_pictures_that_fail_leave_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gmar_lightning import trainer as questions

    def fails(*args: Any) -> Any:
        raise ValueError("not an image")

    monkeypatch.setattr(questions, "to_uint8_image", fails)
    said, _, rows = run(tmp_path)
    assert said == ["GMARCallback: the probe images cannot be drawn (not an image); numbers only"]
    assert len(rows.of_gmar()) == 9


def test_on_collapse_that_raises(tmp_path: Path) -> None:
    def spoil(trainer: Any, module: Any) -> None:
        with torch.no_grad():
            module.net.head.weight.fill_(torch.nan)

    def react(*args: Any) -> None:
        raise KeyError("mine")

    said, _, _ = run(tmp_path, callbacks=[At(5, spoil)], on_collapse=react)
    assert said == ["GMARCallback: on_collapse failed at step 5, training goes on (KeyError: 'mine')"]


def test_on_error_raise_raises(tmp_path: Path) -> None:
    def fail(forwards: int, images: Tensor) -> None:
        if forwards > 3:
            raise RuntimeError("for debugging")

    with pytest.raises(RuntimeError, match="for debugging"):
        run(tmp_path, hooked(fail), on_error="raise")


def test_failed_probe_leaves_modes_hooks_and_random_state(tmp_path: Path) -> None:
    def fail(forwards: int, images: Tensor) -> None:
        torch.rand(3)
        raise RuntimeError("inside")

    module = hooked(fail)
    module.net.blocks[1].eval()
    seen: list[Any] = []

    class Before(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            seen.append(state())

    class After(Before):
        pass

    def state() -> Any:
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()]
        modes = [m.training for m in module.modules()]
        return hooks, modes, torch.get_rng_state().tolist(), torch.is_grad_enabled(), sorted(vars(module))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(
            tmp_path, module, loaders(4), callbacks=[Before(), watcher(tmp_path, on_error="warn"), After()],
            max_epochs=1,
        )  # fmt: skip
    assert seen[0] == seen[1]


def test_probe_images_are_kept_apart_from_the_users(tmp_path: Path) -> None:
    mine = images_of(4)
    callback = watcher(tmp_path, probe_batch=(mine, torch.arange(4)))
    mine.zero_()
    assert callback.watches[0].given is not None
    assert callback.watches[0].given.images.abs().sum() > 0
