"""Files and names that somebody else made: pictures, checkpoints, escape sequences; and what a record gives away."""

from __future__ import annotations

import getpass
import json
import os
import pickle
import socket
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gmar_lightning import History
from gmar_lightning.monitor.photographs import read_photograph
from gmar_lightning.show.console import closing_lines, event_table
from gmar_lightning.show.report import write_report
from gmar_lightning.show.terminal import plain
from gmar_lightning.show.watch import probe_line
from gmar_lightning.training.explain_files import _read
from gmar_lightning.training.weights import read_weights, refuse_code
from tests.helpers.tiny import Classifier, fit, loaders, watcher

HOSTILE = "\033]0;owned\007\033[31mred\r\n\u202etxt\u009b2J\udc80"


def gradient(height: int = 40, width: int = 60) -> np.ndarray:
    return np.broadcast_to(np.linspace(0, 1, width), (height, width))


def test_pictures_of_every_kind_look_as_they_should(tmp_path: Path) -> None:
    eight = (gradient() * 255).round().astype(np.uint8)
    grey = Image.fromarray(eight)
    Image.fromarray((gradient() * 65535).round().astype(np.uint16)).save(tmp_path / "16.png")
    Image.fromarray((gradient() * 65535).round().astype(np.uint16)).save(tmp_path / "16.tif")
    grey.convert("RGB").convert("CMYK").save(tmp_path / "cmyk.jpg", quality=98)
    grey.convert("P").save(
        tmp_path / "palette.gif", save_all=True, append_images=[grey.point(lambda v: 255 - v)]
    )
    grey.convert("LA").save(tmp_path / "alpha.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side: to be turned by 90 degrees clockwise
    grey.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.jpg", exif=exif, quality=98)
    for path in tmp_path.iterdir():
        picture = np.asarray(read_photograph(path)).astype(int)
        assert picture.shape == (40, 60, 3), path
        assert np.abs(picture - eight[..., None]).max() <= 6, path


def bomb(path: Path, side: int = 60_000) -> None:
    """A PNG of a few kilobytes whose header promises 3.6 thousand million pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(1000))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def test_what_is_no_picture_is_one_kind_of_error(tmp_path: Path) -> None:
    good = tmp_path / "good.png"
    Image.fromarray((gradient() * 255).astype(np.uint8)).save(good)
    content = good.read_bytes()
    bomb(tmp_path / "bomb.png")
    (tmp_path / "torn.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "noise.gif").write_bytes(b"GIF89a" + bytes(range(256)))
    Image.fromarray(gradient().astype(np.float32)).save(tmp_path / "float.tif")
    (tmp_path / "folder.jpg").mkdir()
    good.unlink()
    for path in [*tmp_path.iterdir(), tmp_path / "missing.jpg"]:
        with pytest.raises((OSError, ValueError)):
            read_photograph(path)


def test_a_strip_is_not_blown_up(tmp_path: Path) -> None:
    strip = np.zeros((2, 60_000), np.uint8)
    strip[:, 29_990:30_010] = 200
    Image.fromarray(strip).save(tmp_path / "strip.png")
    seen = _read(tmp_path / "strip.png", 224)  # 224 x 6,720,000 pixels otherwise
    assert seen.shape == (224, 224, 3)
    assert (seen == 200).all()


class Runs:
    """Pickled, it runs code when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_code_in_a_checkpoint_is_refused_in_words(tmp_path: Path) -> None:
    trap = tmp_path / "ran"
    for name, content in (
        ("a.ckpt", {"state_dict": {}, "extra": Runs(trap)}),
        ("b.pt", torch.nn.Linear(2, 2)),
    ):
        torch.save(content, tmp_path / name)
    (tmp_path / "c.pt").write_bytes(pickle.dumps(Runs(trap)))
    (tmp_path / "d.ckpt").write_text("no checkpoint")
    (tmp_path / "e.ckpt").write_bytes((tmp_path / "a.ckpt").read_bytes()[:200])
    for name in ("a.ckpt", "b.pt", "c.pt", "d.ckpt", "e.ckpt"):
        for load in (refuse_code, read_weights):
            with pytest.raises(ValueError, match=r"can run code|no checkpoint|cannot be read") as raised:
                load(tmp_path / name)
            assert "weights_only" not in str(raised.value), raised.value
            assert len(str(raised.value)) < 600
    assert not trap.exists()
    with pytest.raises(ValueError, match="can run code"):
        refuse_code(tmp_path / "b.pt")


def harmless(text: str) -> bool:
    return not any(ord(c) < 32 or 127 <= ord(c) < 160 or c in "\u202e\u2066" for c in text)


def test_names_that_command_a_terminal_are_written_out(tmp_path: Path) -> None:
    assert plain("größe 猫 👨\u200d👩\u200d👧 [x]") == "größe 猫 👨\u200d👩\u200d👧 [x]"
    assert harmless(plain(HOSTILE))
    plain(HOSTILE).encode()  # can be printed on any terminal
    lines = closing_lines(
        metrics={f"acc{HOSTILE}": 0.5}, probes=1, failed=0, probe_seconds=1, run_seconds=1,
        flagged=[(f"block{HOSTILE}", 0)], folder=Path(f"/x/{HOSTILE}"), wandb_offline=None,
    )  # fmt: skip
    lines += event_table([{"step": 1, "kind": "collapsed", "message": HOSTILE}])
    assert all(map(harmless, lines))

    class Named(Classifier):
        class_names = (HOSTILE[:-1], "</script><img src=x onerror=alert(1)>", "../../etc/passwd", "{{data}}")

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            self.log(f"val/{HOSTILE[:-1]}", 1.0)

    fit(tmp_path, Named(), loaders(16), callbacks=[watcher(tmp_path)], max_epochs=1)
    history = History.load(tmp_path / "gmar")
    assert history.run["class_names"] == list(Named.class_names)
    assert all(harmless(probe_line(record)) for record in history.records)
    assert f"val/{HOSTILE[:-1]}" in history.records[-1].metrics
    page = write_report(tmp_path / "gmar").read_text("utf-8")
    assert "<img src=x" not in page
    assert "\033" not in page
    assert not [path for path in tmp_path.rglob("*") if "passwd" in path.name]


def test_a_record_tells_a_stranger_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No path, host, user or environment, even where a probe failed with a path in its message."""
    monkeypatch.setenv("SECRET_TOKEN", "hunter2hunter2")

    class Fails(Classifier):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if not self.training and torch.is_grad_enabled() and self.global_step > 2:
                open(tmp_path / "not" / "there")  # noqa: SIM115
            return self.net(images)

    with pytest.warns(UserWarning, match="failed"):
        fit(tmp_path, Fails(), loaders(16), callbacks=[watcher(tmp_path, on_error="warn")], max_epochs=2)
    assert any(record.failure for record in History.load(tmp_path / "gmar").records)
    # The name of the run's own folder is what the report is called by.
    secrets = [str(tmp_path), str(Path.home()), os.getcwd(), socket.gethostname(), "hunter2hunter2"]
    secrets += [name for name in (getpass.getuser(),) if len(name) > 4]
    for path in (tmp_path / "gmar").rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert not [secret for secret in secrets if len(secret) > 3 and secret.encode() in content], path
    assert json.loads((tmp_path / "gmar" / "run.json").read_text())
