"""Every logged name stands in one table, and the documentation's table has the same names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from gmar_lightning.monitor.live import FAITHFULNESS
from gmar_lightning.show import dashboard, keys
from tests.helpers.tiny import Classifier, Rows, fit, loaders, watcher

ROOT = Path(__file__).parents[1]


def template(name: str) -> str:
    """The name in the table that a logged name stands for."""
    name = re.sub(r"_L\d\d$", "_L{layer:02d}", name)
    return re.sub(r"/L\d\d_H\d\d$", "/L{layer:02d}_H{head:02d}", name)


def test_everything_that_is_logged_is_in_the_table(tmp_path: Path) -> None:
    """A real run with everything switched on, and a logger that keeps every name it is given."""

    class Everything(Rows):
        def __init__(self) -> None:
            super().__init__()
            self.pictures: list[str] = []

        def log_image(self, key: str, images: Any, **settings: Any) -> None:
            self.pictures.append(key)

    logger = Everything()
    callback = watcher(tmp_path, log_per_head=True, faithfulness_every=1, log_rollouts=["paper", "gradient"])
    trainer, _ = fit(tmp_path, Classifier(), loaders(), callbacks=[callback], logger=logger)
    logged = {name for _, row in logger.rows for name in row if name.startswith("gmar")}
    logged |= set(logger.pictures) | {name for name in trainer.callback_metrics if name.startswith("gmar")}
    assert {template(name) for name in logged} <= set(keys.KEYS)
    numbers = set(keys.of_kind("number", "layer number", "head number"))
    # the primary form is shown anyway, under its own name
    assert {name for name in logger.pictures if name.startswith("gmar/heatmaps")} == {
        "gmar/heatmaps",
        "gmar/heatmaps_paper",
    }
    missing = numbers - {template(name) for name in logged}
    assert not missing, "in the table, and never logged"


def test_the_table_says_something_of_every_name() -> None:
    assert all(key.meaning and key.meaning[0] != " " for key in keys.KEYS.values())
    assert all(f"{keys.FAITHFULNESS_PREFIX}{name}" in keys.KEYS for name in FAITHFULNESS)
    assert set(dashboard.summary(_Empty())) <= set(keys.KEYS)  # pyright: ignore[reportArgumentType]


class _Empty:
    records: tuple[Any, ...] = ()
    layers: tuple[str, ...] = ()


@pytest.mark.parametrize("name", [name for name in keys.KEYS if keys.KEYS[name].kind != "summary"])
def test_the_documentation_has_every_name(name: str) -> None:
    """README or a page of the documentation."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    assert documented(name, "\n".join(page.read_text("utf-8") for page in pages)), f"{name} is in no page"


def documented(name: str, text: str) -> bool:
    """Whether a text has the name, or one of the ways to shorten it: `{a,b}_L00`, `gmar/faithfulness_*`."""
    plain = name.format(layer=0, head=0)
    if name.startswith(keys.FAITHFULNESS_PREFIX):
        return plain in text or f"{keys.FAITHFULNESS_PREFIX}*" in text
    room, _, rest = plain.partition("/")
    listed = re.findall(re.escape(room) + r"/\{([^}]*)\}_L00", text)
    return plain in text or any(rest.removesuffix("_L00") in names.split(",") for names in listed)


def test_a_name_that_is_not_documented_is_noticed() -> None:
    text = "`gmar_layers/{entropy,importance}_L00` and gmar/heatmaps"
    assert documented(keys.LAYER_ENTROPY, text)
    assert not documented(keys.LAYER_EFFECTIVE_HEADS, text)
    assert not documented(keys.INPUTS, text)
