"""When a probe is due."""

import pytest

from gmar_lightning.monitor.schedule import Every


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
