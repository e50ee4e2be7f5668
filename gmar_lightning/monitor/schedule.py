"""When to probe."""

from __future__ import annotations

import math
from typing import Any

from gmar_lightning.monitor.processes import of_first_process

# Most of a run's time that probes may take when the interval adapts.
SHARE = 0.01
# The step whose probe measures what a probe costs: the first one is slower, as it also tests itself and the maps.
_FIRST = 20
_LONGEST = 1_000_000


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
        crossed = self.ahead(count)
        self._last = max(count, self._last)
        return crossed

    def ahead(self, count: int) -> bool:
        """Whether `count` would be due, without answering for it."""
        return count // self.interval > self._last // self.interval

    def reset(self, count: int = 0) -> None:
        """Start counting from here."""
        self._last = count

    fixed = True

    @property
    def described(self) -> str:
        """How a record says it."""
        return f"{self.interval} {self.unit}s"

    def begin(self, count: int, now: float) -> None:
        """Told when training starts: after `count` steps, at this time in seconds."""

    def paid(self, count: int, seconds: float, now: float) -> str | None:
        """Told what the probe after `count` steps took, at this time; a sentence where the interval changes."""

    def state_dict(self) -> dict[str, Any]:
        """The counter last asked about."""
        return {"last": self._last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved counter."""
        self._last = int(state["last"])


class Adaptive(Every):
    """As often as a share of the run's time allows, in steps: once early, and from then on by what that cost.

    After each probe the interval is the smallest of 1, 2, 5, 10, 20, 50, ... steps that keeps probes, at their mean
    cost so far, within the share of the time that so many steps take. Process zero measures and tells the others: all
    of them probe at the same step.

    Args:
        share: Most of the time that probes may take; the first and the last probe come on top.
    """

    fixed = False

    def __init__(self, share: float = SHARE) -> None:
        super().__init__(steps=_FIRST)
        self.share, self._mark = share, None
        self.reset()

    @property
    def described(self) -> str:
        """How a record says it."""
        return f"auto: at most {100 * self.share:g} % of the time"

    def reset(self, count: int = 0) -> None:
        """Start counting and measuring from here."""
        super().reset(count)
        self.interval, self._mark = _FIRST, None
        self._steps, self._training, self._probes, self._spent = 0, 0.0, 0, 0.0

    def begin(self, count: int, now: float) -> None:
        """Training starts, or goes on, after `count` steps."""
        self._mark = count, now

    def paid(self, count: int, seconds: float, now: float) -> str | None:
        """Choose the interval anew after a probe; a sentence that says what was chosen, where it changed."""
        if self._mark is None or count <= self._mark[0]:
            return None
        steps, training = count - self._mark[0], now - self._mark[1] - seconds
        self._steps, self._training = self._steps + steps, self._training + training
        self._probes, self._spent = self._probes + 1, self._spent + seconds
        self._mark = count, now
        # The last stretch where it was faster: steps that compilation or an empty cache slowed down come no more.
        step = min(self._training / self._steps, training / steps)
        probe = self._spent / self._probes
        before = self.interval
        self.interval, step, probe = of_first_process((_round_above(probe, self.share * step), step, probe))
        if self.interval == before:
            return None
        return (
            f"a probe takes {probe:.2g} s and a step {step:.2g} s: every {self.interval} steps keeps probes under "
            f"{100 * self.share:g} % of the time"
        )

    def state_dict(self) -> dict[str, Any]:
        """The counter last asked about, the interval, and what it rests on."""
        measured = [self._steps, self._training, self._probes, self._spent]
        return {**super().state_dict(), "interval": self.interval, "measured": measured}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state, also of a fixed interval."""
        super().load_state_dict(state)
        self.interval = state.get("interval", self.interval)
        self._steps, self._training, self._probes, self._spent = state.get("measured", (0, 0.0, 0, 0.0))


def _round_above(cost: float, allowed: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, ... that is at least `cost / allowed`."""
    wanted = cost / allowed if allowed > 0 else math.inf
    rounded = (factor * 10**power for power in range(6) for factor in (1, 2, 5))
    return next((number for number in rounded if number >= wanted), _LONGEST)


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
