"""The built wheel in somebody else's project: a clean environment, a script that knows only the public names."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent

PLAIN_SCRIPT = """
import sys

for name in ("timm", "wandb"):
    sys.modules[name] = None  # not installed here

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gmar_lightning import GMARCallback


class ViT(LightningModule):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(1, 32, 4, 4)
        self.cls = nn.Parameter(torch.zeros(1, 1, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls.expand(len(x), -1, -1), tokens], 1)
        return self.head(self.encoder(tokens)[:, 0])

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, _):
        pass

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


data = TensorDataset(torch.randn(64, 1, 16, 16), torch.arange(64) % 4)
trainer = Trainer(max_epochs=2, callbacks=[GMARCallback(every_n_train_steps=4)], logger=False, accelerator="cpu")
trainer.fit(ViT(), DataLoader(data, 8), DataLoader(data, 8))
"""

HUGGING_FACE_SCRIPT = """
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader
from transformers import ViTConfig, ViTForImageClassification

from gmar_lightning import GMARCallback


class FineTune(LightningModule):
    def __init__(self):
        super().__init__()
        config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
                           image_size=16, patch_size=4, num_labels=4)
        self.vit = ViTForImageClassification(config)

    def training_step(self, batch, _):
        return self.vit(**batch).loss

    def validation_step(self, batch, _):
        self.log("val_loss", self.vit(**batch).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


data = [{"pixel_values": torch.randn(3, 16, 16), "labels": i % 4} for i in range(32)]
trainer = Trainer(max_epochs=2, callbacks=[GMARCallback(module="vit")], logger=False, accelerator="cpu")
trainer.fit(FineTune(), DataLoader(data, 8), DataLoader(data, 8))
"""


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """Wheel and source archive, built from a copy of the project."""
    folder = tmp_path_factory.mktemp("dist")
    source = folder / "source"
    ignored = shutil.ignore_patterns(".git", "runs", "dist", "*.egg-info", "__pycache__", ".venv")
    shutil.copytree(ROOT, source, ignore=ignored)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    return folder


@pytest.fixture(scope="module")
def python(dist, tmp_path_factory):
    """A clean environment with the wheel; its dependencies are borrowed from this one."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=True)
    (wheel,) = dist.glob("*.whl")
    binary = folder / "bin" / "python"
    subprocess.run(
        [binary, "-m", "pip", "install", "-q", "--no-deps", wheel], check=True, capture_output=True
    )
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    borrowed = folder / "lib" / version / "site-packages" / "borrowed.pth"
    borrowed.write_text(sysconfig.get_path("purelib") + "\n")
    return binary


def run(python, script, cwd):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    return subprocess.run(
        [python, "-c", script],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_wheel_holds_types_and_template_and_nothing_else(dist):
    (wheel,) = dist.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "gmar_lightning/py.typed" in names
    page = [path.name for path in (ROOT / "gmar_lightning" / "show" / "page").glob("*.js")]
    assert len(page) > 5
    for name in ("report.html", "report.css", *(f"page/{script}" for script in page)):
        assert f"gmar_lightning/show/{name}" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"gmar_lightning"}


def test_twine_finds_nothing_to_complain_about(dist):
    files = [str(path) for path in (*dist.glob("*.whl"), *dist.glob("*.tar.gz"))]
    assert len(files) == 2
    check = [sys.executable, "-m", "twine", "check", "--strict", *files]
    printed = subprocess.run(check, capture_output=True, text=True, check=False)
    assert printed.returncode == 0, printed.stdout + printed.stderr


@pytest.mark.parametrize("script", [PLAIN_SCRIPT, HUGGING_FACE_SCRIPT], ids=["plain", "hugging-face"])
def test_callback_in_a_strangers_script(python, tmp_path, script):
    where = run(python, "import gmar_lightning; print(gmar_lightning.__file__)", tmp_path)
    assert str(python.parent.parent) in where.stdout, where.stderr
    printed = run(python, script, tmp_path)
    assert printed.returncode == 0, printed.stderr[-3000:]
    assert "probes" in printed.stdout
    assert (tmp_path / "gmar" / "report.html").is_file()
    assert len(list((tmp_path / "gmar" / "heatmaps").rglob("*.jpg"))) >= 16
