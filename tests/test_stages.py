"""Every stage of a Trainer: where it probes, where it must not, and that it never gets in the way."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    LearningRateFinder,
    ModelCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader

from gmar_lightning import GMARCallback, History
from gmar_lightning.callback import ConfigurationError
from tests.helpers.tiny import Classifier, Images, Rows, fit, images_of, loaders, watcher


def steps(folder: Path) -> list[tuple[int, int]]:
    record = History.load(folder / "gmar").records
    assert not [line.failure for line in record if line.failure]
    return [(line.global_step, line.step) for line in record]


def test_fit_probes_before_at_the_interval_and_at_the_end(tmp_path: Path) -> None:
    _, rows = fit(tmp_path, Classifier(), loaders(), callbacks=[watcher(tmp_path, every_n_train_steps=5)])
    assert steps(tmp_path) == [(0, 0), (5, 4), (10, 9), (15, 14), (16, 15)]
    assert [step for step, _ in rows.of_gmar()] == [0, 4, 9, 14, 15]
    trained = [step for step, row in rows.rows if "train/loss" in row]
    assert set(trained) >= {4, 9, 14, 15}  # the same x-axis


def test_fit_by_epochs(tmp_path: Path) -> None:
    callback = watcher(tmp_path, every_n_train_steps=None, every_n_epochs=2)
    fit(tmp_path, Classifier(), loaders(16), callbacks=[callback], max_epochs=5)
    assert steps(tmp_path) == [(0, 0), (8, 7), (16, 15), (20, 19)]


def test_optimizers_stepped_by_hand(tmp_path: Path) -> None:
    class ByHand(Classifier):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            loss = super().training_step(batch, batch_idx)
            optimizer = self.optimizers().optimizer
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    with pytest.warns(UserWarning, match="counted no optimizer step"):
        fit(tmp_path, ByHand(), loaders(16), callbacks=[watcher(tmp_path)])
    assert steps(tmp_path) == [(0, 0), (0, 7)]
    by_epoch = watcher(tmp_path / "e", every_n_train_steps=None, every_n_epochs=1)
    fit(tmp_path, ByHand(), loaders(16), callbacks=[by_epoch])
    assert steps(tmp_path / "e") == [(0, 0), (0, 3), (0, 7)]


def test_fast_dev_run_takes_one_probe_and_leaves_no_record(tmp_path: Path) -> None:
    callback = GMARCallback(num_images=4, on_error="raise")
    trainer, _ = fit(tmp_path, Classifier(), loaders(), callbacks=[callback], fast_dev_run=True)
    assert float(trainer.callback_metrics["gmar/collapsed_heads"]) == 0
    assert not list(tmp_path.rglob("history.jsonl"))
    fit(tmp_path, Classifier(), loaders(), callbacks=[watcher(tmp_path)], fast_dev_run=3)
    assert steps(tmp_path) == [(0, 0)]


class SeesProbes(Callback):
    """Whether anything was there when the sanity check ended, and when training began."""

    def __init__(self, folder: Path):
        self.folder, self.seen = folder, []

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seen.append((self.folder / "gmar").exists())

    def on_train_batch_start(self, *args: Any) -> None:
        self.seen.append((self.folder / "gmar").exists())


def test_sanity_check_takes_none(tmp_path: Path) -> None:
    sees = SeesProbes(tmp_path)
    fit(
        tmp_path,
        Classifier(),
        loaders(4),
        callbacks=[watcher(tmp_path), sees],
        max_epochs=1,
        num_sanity_val_steps=2,
    )
    assert sees.seen == [False, True]


def test_validate_test_and_predict_take_none(tmp_path: Path) -> None:
    trainer = Trainer(
        accelerator="cpu", callbacks=[watcher(tmp_path)], logger=False, enable_progress_bar=False,
        enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    module, loader = Classifier(), DataLoader(Images(8), 4)
    trainer.validate(module, loader, verbose=False)
    trainer.test(module, loader, verbose=False)
    module.predict_step = lambda batch, batch_idx: module(batch[0])
    assert len(trainer.predict(module, loader)) == 2
    assert not (tmp_path / "gmar").exists()


def test_overfit_batches(tmp_path: Path) -> None:
    fit(tmp_path, Classifier(), loaders(), callbacks=[watcher(tmp_path)], overfit_batches=2, max_epochs=3)
    assert steps(tmp_path) == [(0, 0), (3, 2), (6, 5)]


def test_without_validation_the_data_set_is_still_there(tmp_path: Path) -> None:
    fit(tmp_path, Classifier(), loaders(16), callbacks=[watcher(tmp_path)], limit_val_batches=0)
    assert len(steps(tmp_path)) == 4


def test_fit_called_again_with_the_same_trainer(tmp_path: Path) -> None:
    module, data = Classifier(), loaders(16)
    trainer, _ = fit(tmp_path, module, data, callbacks=[watcher(tmp_path)], max_epochs=1)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, *data)
    assert steps(tmp_path) == [(0, 0), (3, 2), (4, 3), (6, 5), (8, 7)]


def test_fit_called_again_with_a_new_trainer_is_a_new_run(tmp_path: Path) -> None:
    callback = watcher(tmp_path)
    for _ in range(2):
        fit(tmp_path, Classifier(), loaders(16), callbacks=[callback], max_epochs=1)
    assert steps(tmp_path) == [(0, 0), (3, 2), (4, 3)]
    assert len(History.load(tmp_path / "gmar" / "previous_01").records) == 3


def test_fit_called_again_with_other_validation_images(tmp_path: Path) -> None:
    module, data = Classifier(), loaders(16)
    trainer, _ = fit(tmp_path, module, data, callbacks=[watcher(tmp_path)], max_epochs=1)
    trainer.fit_loop.max_epochs = 2
    with pytest.warns(UserWarning, match="starts a new segment"):
        trainer.fit(module, data[0], DataLoader(Images(8, seed=5), 4))
    history = History.load(tmp_path / "gmar")
    assert [record.segment for record in history.records] == [0, 0, 0, 1, 1]
    assert len(history.run["segments"]) == 2


def test_learning_rate_finder_and_batch_size_finder(tmp_path: Path) -> None:
    class Tunable(Classifier):
        def __init__(self):
            super().__init__()
            self.lr, self.batch_size = 1e-3, 2

        def train_dataloader(self) -> DataLoader:
            return DataLoader(Images(32), self.batch_size, shuffle=True)

        def val_dataloader(self) -> DataLoader:
            return DataLoader(Images(8, seed=1), 4)

    def run(folder: Path, watchers: list[Any]) -> Any:
        seed_everything(3, verbose=False)
        module = Tunable()
        finders = [
            BatchSizeFinder(max_trials=2, steps_per_trial=1, init_val=2),
            LearningRateFinder(num_training_steps=5, update_attr=True),
        ]
        trainer = Trainer(
            accelerator="cpu", callbacks=[*watchers, *finders], logger=Rows(), enable_progress_bar=False,
            max_epochs=1, default_root_dir=folder, enable_checkpointing=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module)
        return module, trainer

    module, trainer = run(tmp_path / "a", [watcher(tmp_path)])
    plain, _ = run(tmp_path / "b", [])
    assert (module.batch_size, module.lr) == (plain.batch_size, plain.lr)
    for ours, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert steps(tmp_path)[0] == (0, 0)
    assert steps(tmp_path)[-1][0] == trainer.global_step


def test_tuner_before_fit(tmp_path: Path) -> None:
    module, data, callback = Classifier(), loaders(16), watcher(tmp_path)
    module.lr = 1e-3
    trainer = Trainer(
        accelerator="cpu", callbacks=[callback], logger=Rows(), enable_progress_bar=False, max_epochs=1,
        default_root_dir=tmp_path, enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip
    Tuner(trainer).lr_find(module, *data, num_training=4)
    assert not (tmp_path / "gmar").exists()
    trainer.fit(module, *data)
    assert steps(tmp_path) == [(0, 0), (3, 2), (4, 3)]


def test_should_stop_ends_with_a_last_probe(tmp_path: Path) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            trainer.should_stop = trainer.global_step == 4

    fit(tmp_path, Classifier(), loaders(), callbacks=[watcher(tmp_path), Stop()])
    assert steps(tmp_path) == [(0, 0), (3, 2), (4, 3)]


def test_collapse_can_stop_the_run(tmp_path: Path) -> None:
    class Zeroed(Classifier):
        """NaN from the fifth step on."""

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if self.global_step == 5:
                with torch.no_grad():
                    self.net.head.weight.fill_(torch.nan)

    with pytest.warns(UserWarning, match="NaN or infinite at step 5"):
        trainer, _ = fit(
            tmp_path, Zeroed(), loaders(), callbacks=[watcher(tmp_path, on_collapse="stop")], max_epochs=9
        )
    assert trainer.global_step < 16


def test_barebones_is_refused_in_a_sentence(tmp_path: Path) -> None:
    trainer = Trainer(accelerator="cpu", barebones=True, max_epochs=1, callbacks=[watcher(tmp_path)])
    with pytest.raises(ConfigurationError, match=r"barebones=True.*Remove one of the two"):
        trainer.fit(Classifier(), *loaders())


def test_several_loggers_each_get_every_probe(tmp_path: Path) -> None:
    rows, csv, board = Rows(), CSVLogger(tmp_path), TensorBoardLogger(tmp_path)
    fit(tmp_path, Classifier(), loaders(16), callbacks=[watcher(tmp_path)], logger=[rows, csv, board])
    assert [step for step, _ in rows.of_gmar()] == [0, 2, 5, 7]
    written = (Path(csv.log_dir) / "metrics.csv").read_text().splitlines()
    column = written[0].split(",").index("gmar/collapsed_heads")
    assert sum(line.split(",")[column] != "" for line in written[1:]) == 4
    assert list(Path(board.log_dir).glob("events*"))


def test_without_logger_the_local_record_is_there_and_one_line_says_where(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = GMARCallback(every_n_train_steps=3, num_images=4, on_error="raise")
    with caplog.at_level(logging.INFO):
        fit(tmp_path, Classifier(), loaders(16), callbacks=[callback], logger=False, max_epochs=1)
    said = [record.getMessage() for record in caplog.records if "no logger" in record.getMessage()]
    assert said == [f"GMARCallback: no logger; the record goes to {tmp_path / 'gmar'}"]
    assert len(steps(tmp_path)) == 3


def test_other_callbacks_can_monitor_the_numbers(tmp_path: Path) -> None:
    stop = EarlyStopping("gmar/collapsed_heads", patience=2, check_on_train_epoch_end=True)
    keep = ModelCheckpoint(tmp_path, monitor="gmar/importance_min", mode="max", save_top_k=1)
    trainer, _ = fit(
        tmp_path, Classifier(), loaders(16), callbacks=[stop, keep, watcher(tmp_path)], max_epochs=9,
        enable_checkpointing=True,
    )  # fmt: skip
    assert trainer.current_epoch == 3  # a constant zero: stopped when the patience was over
    assert keep.best_model_score is not None


def test_callback_can_be_copied_and_pickled(tmp_path: Path) -> None:
    import copy
    import pickle

    callback = GMARCallback(probe_batch=(images_of(2), torch.tensor([0, 1])))
    assert pickle.loads(pickle.dumps(callback)).state_key == callback.state_key
    assert copy.deepcopy(callback).state_key == callback.state_key
