"""What a run does about events: alarms act, attention that degenerates is said."""

import warnings

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from gmar_lightning.monitor.events import HeadEvent
from gmar_lightning.monitor.record import ProbeRecord
from gmar_lightning.monitor.say import SayOnce
from gmar_lightning.reaction import Reaction
from gmar_lightning.recording import Tolerance


def event(kind):
    return HeadEvent(9, kind, 0, 1, "blocks.0.attn", 0.01, 0.2, 5, f"{kind} of head 1.")


def react(choice, kinds):
    """The text of warnings and alerts, what a callable got, and whether the run is to stop."""
    alerted, called, trainer = [], [], Trainer(logger=False, accelerator="cpu", enable_checkpointing=False)
    reacts = choice or (lambda *given: called.append([event.kind for event in given[2]]))
    reaction = Reaction(reacts, Tolerance("raise", SayOnce()))
    record = ProbeRecord(step=9, global_step=9, events=tuple(event(kind) for kind in kinds))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reaction.to(trainer, BoringModel(), record, lambda *text: alerted.append(text[1]))
    said = "".join(str(warning.message) for warning in caught if "GMARCallback" in str(warning.message))
    return said, "".join(alerted), called, trainer.should_stop


@pytest.mark.parametrize("choice", ["warn", "alert", "stop", None])
def test_attention_that_degenerates_is_said_but_stops_nothing(choice):
    said, alerted, called, stopped = react(choice, ["dominance", "entropy_collapse", "attention_sink_end"])
    assert "entropy_collapse of head 1." in said
    assert "dominance" not in said
    assert "attention_sink" not in said
    assert ("entropy_collapse" in alerted) == (choice in ("alert", "stop"))
    assert (called, stopped) == ([], False)


@pytest.mark.parametrize("choice", ["warn", "alert", "stop", None])
def test_a_collapse_beside_it_is_reacted_to(choice):
    said, alerted, called, stopped = react(choice, ["collapsed", "rank_collapse"])
    assert "rank_collapse" in said
    assert ("collapsed of" in said) == (choice is not None)  # a callable has taken that over
    assert ("collapsed of" in alerted) == (choice in ("alert", "stop"))
    assert called == ([["collapsed"]] if choice is None else [])
    assert stopped == (choice == "stop")
