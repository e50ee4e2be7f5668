"""Which of the logged metrics is the accuracy and which the loss."""

from collections.abc import Sequence

from gmar_lightning.monitor.history import History


def logged_names(history: History) -> list[str]:
    """Names of all metrics that the trainer had logged at some probe, in order of appearance."""
    return list(dict.fromkeys(name for record in history.records for name in record.metrics))


def accuracy_name(history: History) -> str | None:
    """The validation accuracy if there is one, else another accuracy, else None."""
    return _preferred([n for n in logged_names(history) if "acc" in n.lower()], ("val", "test", "train"))


def loss_name(history: History) -> str | None:
    """The training loss if there is one, else another loss, else None."""
    return _preferred([n for n in logged_names(history) if "loss" in n.lower()], ("train", "val"))


def _preferred(names: Sequence[str], wishes: Sequence[str]) -> str | None:
    for wish in wishes:
        for ending in ("_epoch", ""):
            for name in names:
                if wish in name.lower() and name.endswith(ending):
                    return name
    return names[0] if names else None
