"""The pages run: every Python block of the README and of docs/ is executed, page by page, on a tiny model."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from gmar_lightning.show.keys import KEYS
from tests.helpers.tiny import Classifier, images_of, loaders, vit

ROOT = Path(__file__).parent.parent
PAGES = sorted(ROOT.glob("docs/*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.stem)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    shutil.copytree(ROOT / "tests/data/record_format_1", tmp_path / "runs/cells/version_0/gmar")
    train_loader, val_loader = loaders()
    names = {
        "model": Classifier(),
        "vit": vit(),
        "images": images_of(4),
        "labels": torch.arange(4),
        "train_loader": train_loader,
        "val_loader": val_loader,
    }
    for block in blocks:
        exec(compile(block, page.name, "exec"), names)
    if page.stem == "README":
        assert len(blocks) >= 2


def test_every_page_says_whom_it_serves():
    assert len(PAGES) >= 5
    for page in PAGES:
        assert page.read_text(encoding="utf-8").startswith("For those who "), page


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_dashboard_page_lists_every_logged_name():
    page = (ROOT / "docs/dashboard.md").read_text(encoding="utf-8")
    logged = page.split("## Reading it")[0]
    rows = dict(re.findall(r"^\| `(gmar[^`]*)` \| ([^|]*) \| ", logged, re.M))
    named = {name.format(layer=0, head=0): key.meaning for name, key in KEYS.items()}
    assert rows == named
