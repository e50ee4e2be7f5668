"""When a probe is due."""

import pytest

from gmar_lightning.monitor.schedule import Adaptive, Every


def due_at(every: Every, counts: list[int]) -> list[int]:
    return [count for count in counts if every.due(count)]


def test_every_multiple_once() -> None:
    assert due_at(Every(steps=3), list(range(1, 11))) == [3, 6, 9]


def test_repeated_counts_of_accumulation_are_due_once() -> None:
    every = Every(steps=2)
    answers = [every.due(count) for count in (0, 0, 1, 1, 1, 2, 2, 2, 3, 4, 4)]
    assert [index for index, answer in enumerate(answers) if answer] == [5, 9]


def test_counts_that_jump_over_multiples() -> None:
    assert due_at(Every(steps=3), [2, 4, 6, 8, 10, 30]) == [4, 6, 10, 30]


def test_goes_on_where_it_was() -> None:
    every = Every(epochs=2)
    every.due(3)
    other = Every(epochs=2)
    other.load_state_dict(every.state_dict())
    assert due_at(other, [3, 4, 5, 6]) == [4, 6]


def test_starts_counting_from_where_a_run_begins() -> None:
    every = Every(steps=10)
    every.reset(25)
    assert due_at(every, list(range(25, 45))) == [30, 40]


@pytest.mark.parametrize(
    "arguments", [{}, {"steps": 1, "epochs": 1}, {"steps": 0}, {"epochs": -1}, {"steps": 1.5}]
)
def test_wrong_arguments(arguments: dict) -> None:
    with pytest.raises(ValueError, match="every_n_"):
        Every(**arguments)


def probed_at(schedule: Adaptive, steps: int, step: float, probe: float, first: float = 10.0) -> list[int]:
    """Steps and probes that take these seconds, on a clock of their own; where probes were taken."""
    now, taken = first, []
    schedule.begin(0, now)
    for count in range(1, steps + 1):
        now += step
        if schedule.due(count):
            now += probe
            taken.append(count)
            schedule.paid(count, probe, now)
    return taken


@pytest.mark.parametrize(
    ("step", "probe"), [(0.1, 0.5), (0.02, 3.0), (30.0, 13.0), (0.05, 0.02), (1.0, 0.009)]
)
def test_an_adaptive_interval_keeps_to_its_share(step: float, probe: float) -> None:
    """For steps and probes of any length: the early one aside, at most 1 % of the time, and not far below."""
    steps, schedule = 50_000, Adaptive()
    taken = probed_at(schedule, steps, step, probe)
    assert taken[0] == 20
    share = (len(taken) - 1) * probe / (steps * step)
    assert share <= 0.01
    assert share >= 0.01 / 2.6 or schedule.interval == 1  # 2 to 5 is the widest gap between intervals


def test_an_adaptive_interval_follows_what_changes() -> None:
    """Compilation makes the first steps slow: the interval that follows from them grows when they are over."""
    schedule, now, taken = Adaptive(), 0.0, []
    schedule.begin(0, now)
    for count in range(1, 100_001):
        now += 3.0 if count < 20 else 0.1
        if schedule.due(count):
            now += 1.0
            taken.append(count)
            schedule.paid(count, 1.0, now)
    assert taken[:4] == [20, 50, 1000, 2000]


def test_an_adaptive_interval_says_what_it_chose_and_goes_on_with_it() -> None:
    schedule = Adaptive()
    schedule.begin(0, 0.0)
    assert schedule.due(20)
    sentence = schedule.paid(20, 0.5, 2.5)
    assert sentence == (
        "a probe takes 0.5 s and a step 0.1 s: every 500 steps keeps probes under 1 % of the time"
    )
    other = Adaptive()
    other.load_state_dict(schedule.state_dict())
    assert other.interval == 500
    other.begin(20, 100.0)
    assert other.due(500)
    assert other.paid(500, 0.5, 100.0 + 48.0 + 0.5) is None  # the same costs: the same interval
    other.reset(0)
    assert other.interval == 20
    fixed = Every(steps=7)
    fixed.load_state_dict(schedule.state_dict())
    assert fixed.interval == 7
