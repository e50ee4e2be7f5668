"""When to probe."""

from __future__ import annotations

from typing import Any


class Every:
    """Due whenever a counter has crossed a multiple of the interval since it was last asked.

    Crossing, not hitting: under gradient accumulation a step count repeats, and with several optimizers it
    jumps over multiples.

    Args:
        steps: Interval in optimizer steps.
        epochs: Interval in epochs; exactly one of the two is given.

    Raises:
        ValueError: When both or neither are given, or the interval is not positive.
    """

    def __init__(self, steps: int | None = None, epochs: int | None = None) -> None:
        if (steps is None) == (epochs is None):
            raise ValueError("give either every_n_train_steps or every_n_epochs, not both and not neither")
        interval = steps if steps is not None else epochs
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
            name = "every_n_train_steps" if epochs is None else "every_n_epochs"
            raise ValueError(f"{name} must be a whole number >= 1, got {interval!r}")
        self.unit = "step" if epochs is None else "epoch"
        self.interval = interval
        self._last = 0

    def due(self, count: int) -> bool:
        """Whether `count` steps or epochs lie beyond a multiple not yet answered for."""
        crossed = count // self.interval > self._last // self.interval
        self._last = max(count, self._last)
        return crossed

    def reset(self, count: int = 0) -> None:
        """Start counting from here."""
        self._last = count

    def state_dict(self) -> dict[str, Any]:
        """The counter last asked about."""
        return {"last": self._last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved counter."""
        self._last = int(state["last"])


def repeats(last: tuple[int, int] | None, now: tuple[int, int]) -> bool:
    """Whether a probe would see the model that the last one saw.

    Steps 0 and 1 share an x: one probe. Lightning also repeats an x after a resume, but there a probe left out
    would be a gap. Without a counted step the weights are the same, unless optimizers are stepped by hand.

    Args:
        last: Optimizer steps and the logger's x of the last probe; None before the first.
        now: The same of the probe in question.
    """
    if last is None:
        return False
    return now <= last or now[0] == last[0] > 0 or (last[0] == 0 and now[1] <= last[1])
