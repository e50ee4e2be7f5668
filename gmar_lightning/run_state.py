"""What the callback carries from probe to probe of one run, and through checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gmar_lightning.monitor.probe import ProbeBatch
from gmar_lightning.monitor.record import Source
from gmar_lightning.monitor.say import SayOnce


@dataclass
class RunState:
    """Plain values of a run.

    Attributes:
        last_probe: Optimizer steps and the logger's x of the last record; None before the first.
        seconds: Time spent in probes, pictures and logging included.
        folder: Where the record is.
        fingerprint: Of the probe images.
        asked: Folder that the user asked for; the record is beside it where another run was writing there.
        indices: Of the probe images in the validation set, where they were chosen there.
    """

    last_probe: tuple[int, int] | None = None
    seconds: float = 0.0
    folder: str | None = None
    fingerprint: str | None = None
    indices: list[int] | None = None
    asked: str | None = None

    def has_other_images(self, probe: ProbeBatch | None, say: SayOnce) -> bool:
        """Note the probe images, None where steps are read; whether the run had others before."""
        fingerprint = None if probe is None else probe.fingerprint
        changed = self.fingerprint is not None and self.fingerprint != fingerprint
        self.fingerprint = fingerprint
        if changed:
            say(
                "GMARCallback: the validation set gives other probe images than before; the record starts a new "
                "segment"
            )
        return changed

    def state_dict(self) -> dict[str, Any]:
        """The values under the names that checkpoints have for them."""
        return {
            "last_probe": list(self.last_probe or ()),
            "probe_seconds": self.seconds,
            "folder": self.folder,
            "save_dir": self.asked,
            "fingerprint": self.fingerprint,
            "probe_images": self.indices,
        }

    @classmethod
    def from_checkpoint(cls, state: Mapping[str, Any], asked: str | None) -> RunState:
        """Continue where `state_dict` was taken, in the same folder unless another is `asked` for now."""
        step, x = state["last_probe"]
        indices = state.get("probe_images")  # missing in older checkpoints
        folder = state["folder"] if state.get("save_dir") == asked else None
        return cls((step, x), state["probe_seconds"], folder, state["fingerprint"], indices, asked)


def continuable(state: Mapping[str, Any], read: Source, say: SayOnce) -> dict[str, Any] | None:
    """A checkpoint's state of the callback, if the run can go on with it.

    Tuners restore states from before the first probe: there is nothing to go on with. And probes are not comparable
    with what is read off training steps: neither goes on with the other's record.
    """
    if not state["last_probe"]:
        return None
    before = state.get("read", "probe")
    if before != read:
        say(
            f'GMARCallback: the run was read="{before}" before and is read="{read}" now; a new record is started'
        )
        return None
    return dict(state)
