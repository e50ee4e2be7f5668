import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from gmar_lightning.monitor.history import History
from gmar_lightning.show.verdict import judge
from gmar_lightning.training.cli import TrainCLI, main
from gmar_lightning.training.data import ImageData
from gmar_lightning.training.model import Classifier

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
SHORT = [
    "--trainer.limit_train_batches=2",
    "--trainer.limit_val_batches=2",
    "--trainer.enable_progress_bar=false",
]
# What a configuration is a delta of, besides base.yaml.
BELOW = {
    "cifar10": "finetune",
    "finetune_low_resolution": "finetune",
    "finetune_mix": "finetune",
    "finetune_unfreeze": "finetune",
    "linear_probe": "finetune",
}


def train(folder, *arguments):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    environment.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )


def val_accuracy(run):
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    return [float(row["val/accuracy"]) for row in rows if row.get("val/accuracy")]


def test_digits_train_resume_and_load(tmp_path, monkeypatch):
    digits = ["fit", "--config", str(CONFIGS / "digits.yaml"), *SHORT]
    done = train(tmp_path, *digits, "--trainer.max_epochs=1")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "digits" / "version_0"
    assert len(val_accuracy(run)) == 1
    assert (run / "config.yaml").is_file()
    assert len(list((tmp_path / "runs" / "wandb").glob("offline-run-*"))) == 1
    assert (run / "gmar" / "history.jsonl").is_file()

    checkpoint = run / "checkpoints" / "best.ckpt"
    model = Classifier.load_from_checkpoint(checkpoint)
    assert (model.image_size, model.mean, model.class_names) == (32, [0.5] * 3, list("0123456789"))
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)

    monkeypatch.chdir(tmp_path)
    again = main(CONFIGS / "base.yaml", [*digits, "--trainer.max_epochs=2", f"--ckpt_path={checkpoint}"])
    # Two batches per epoch: the second epoch went on where the first had ended.
    assert (again.trainer.global_step, again.trainer.current_epoch) == (4, 2)
    assert len(val_accuracy(tmp_path / "runs" / "digits" / "version_1")) == 1


def test_own_folder_by_short_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("ant", "bee"):
        (tmp_path / "photographs" / name).mkdir(parents=True)
        for index in range(5):
            Image.new("RGB", (40, 40), (50 * index, 0, 0)).save(
                tmp_path / "photographs" / name / f"{index}.png"
            )
    arguments = ["fit", "--data=ImageFolder", "--data.root=photographs", "--data.image_size=32"]
    arguments += ["--model.model_args", "{patch_size: 8, embed_dim: 24, depth: 1, num_heads: 2}"]
    cli = main(
        CONFIGS / "base.yaml",
        [*arguments, "--data.batch_size=4", "--trainer.max_epochs=1", "--trainer.logger=false", *SHORT],
    )
    assert cli.model.class_names == ["ant", "bee"]
    assert cli.trainer.global_step == 2
    assert not (tmp_path / "runs").exists()


def test_missing_folder_is_a_clear_error():
    with pytest.raises(ValueError, match="there is no image folder"):
        main(CONFIGS / "base.yaml", ["fit", "--data=ImageFolder", "--data.root=nowhere"])


def test_account_and_prompt_are_only_wanted_when_asked_for(monkeypatch):
    for value, expected in ((None, "offline"), ("online", "online")):
        monkeypatch.delenv("WANDB_MODE", raising=False)
        if value:
            monkeypatch.setenv("WANDB_MODE", value)
        with pytest.raises(ValueError, match="no image folder"):
            main(CONFIGS / "base.yaml", ["fit", "--data=ImageFolder", "--data.root=nowhere"])
        assert os.environ["WANDB_MODE"] == expected


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem != "base"))
def test_every_configuration_makes_a_model_and_a_trainer(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for folder in ("ant", "bee"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / folder / "0.png")
    layers = ["base", *([BELOW[name]] if name in BELOW else []), name]
    arguments = [text for layer in layers for text in ("--config", str(CONFIGS / f"{layer}.yaml"))]
    if "finetune" in layers:
        arguments += ["--model.pretrained=false", "--trainer.accelerator=cpu"]
        arguments += ["--model.model_args", "{embed_dim: 24, depth: 1, num_heads: 2}"]
        arguments += ["--data.root", str(tmp_path)]
    cli = TrainCLI(
        Classifier, ImageData, subclass_mode_data=True, run=False, args=arguments, save_config_callback=None
    )
    assert next(logger.name for logger in cli.trainer.loggers) == name
    assert cli.model.hparams["num_classes"] == cli.datamodule.num_classes
    assert cli.model.image_size == cli.datamodule.image_size
    assert "GMARCallback" in {type(callback).__name__ for callback in cli.trainer.callbacks}


@pytest.mark.slow
def test_digits_reach_95_percent(tmp_path):
    done = train(
        tmp_path, "fit", "--config", str(CONFIGS / "digits.yaml"), "--trainer.enable_progress_bar=false"
    )
    assert done.returncode == 0, done.stderr
    assert val_accuracy(tmp_path / "runs" / "digits" / "version_0")[-1] >= 0.95


def last_probe(run):
    return json.loads((run / "gmar" / "history.jsonl").read_text().splitlines()[-1])


@pytest.mark.slow
def test_sick_runs_are_told_from_a_healthy_one_by_their_flags(tmp_path):
    healthy = ("healthy", "sick_attention_decay", "--model.weight_decay_of=null")
    runs = [healthy, ("decay", "sick_attention_decay"), ("rate", "sick_learning_rate")]
    flagged = {}
    for name, config, *extra in runs:
        arguments = ["--config", str(CONFIGS / f"{config}.yaml"), f"--run_name={name}", *extra]
        done = train(tmp_path, "fit", *arguments, "--trainer.enable_progress_bar=false")
        assert done.returncode == 0, done.stderr
        flagged[name] = len(last_probe(tmp_path / "runs" / name / "version_0")["flagged"])
    assert flagged["healthy"] == 0
    assert flagged["decay"] >= 4
    assert flagged["rate"] >= 9


@pytest.mark.slow
def test_shortcut_shows_in_the_heatmaps_alone(tmp_path):
    last = {}
    for name, correlation in (("sick", 1.0), ("healthy", 0.0)):
        arguments = ["--config", str(CONFIGS / "sick_watermark.yaml"), f"--run_name={name}"]
        done = train(
            tmp_path,
            *("fit", *arguments, f"--data.correlation={correlation}", "--trainer.enable_progress_bar=false"),
        )
        assert done.returncode == 0, done.stderr
        last[name] = last_probe(tmp_path / "runs" / name / "version_0")
    assert last["sick"]["flagged"] == last["healthy"]["flagged"] == []
    assert last["sick"]["metrics"]["val/accuracy"] > 0.99
    sick, healthy = (last[name]["metrics"] for name in ("sick", "healthy"))
    assert sick["val/evidence_gmar"] > 3 * healthy["val/evidence_gmar"]
    assert sick["val/evidence_gmar"] > 10 * healthy["val/evidence_gmar"]
    assert sick["val/evidence_gmar"] > 0.6
    verdicts = {name: judge(History.load(tmp_path / "runs" / name / "version_0" / "gmar")) for name in last}
    assert verdicts["sick"].headline == "shortcut-like evidence"
    assert "row 1, column 1" in next(f.text for f in verdicts["sick"].findings if f.kind == "shortcut")
    assert not verdicts["healthy"].has("shortcut")
