"""Probe images that the user chose with `probe_images`, found with the help of a Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from gmar_lightning.arguments import ConfigurationError
from gmar_lightning.explain.inputs import Inputs, classifier_of, forward, model_inputs
from gmar_lightning.explain.isolation import undisturbed
from gmar_lightning.monitor.probe import ProbeBatch, agreed_probe, draw_indices
from gmar_lightning.monitor.processes import ProbeError
from gmar_lightning.monitor.say import SayOnce
from gmar_lightning.monitor.selection import (
    candidates,
    checked_indices,
    from_folder,
    plain_preparation,
    ranked,
)
from gmar_lightning.trainer import (
    callable_model,
    class_names_of,
    normalisation_of,
    silenced,
    validating,
    validation_loader,
)

Choice = Path | Literal["hardest", "misclassified"] | list[int]


def chosen_probe(
    trainer: Trainer,
    pl_module: LightningModule,
    choice: Choice,
    num_images: int,
    module: str | None,
    class_names: Sequence[str] | None,
    say: SayOnce,
    inputs: Inputs = None,
) -> ProbeBatch:
    """The images that `probe_images` names; every process calls, and all of them get the same.

    Args:
        trainer: Asked for the validation set.
        pl_module: The model; runs once over the candidates for "hardest" and "misclassified", without a trace.
        choice: As `selection.checked_choice` returns it.
        num_images: At most so many, unless indices are given.
        module: Dotted path of the classifier inside the model.
        class_names: To turn the names of folders into classes; found when None.
        say: Says a sentence on the console, once.
        inputs: Makes of a batch what the model takes, see `gmar`.

    Raises:
        ConfigurationError: When they cannot be had, with what to change.
    """

    def transfer(batch: Any) -> Any:
        return trainer.strategy.batch_to_device(batch, device=pl_module.device, dataloader_idx=0)

    def choose() -> ProbeBatch:
        if isinstance(choice, Path):
            prepare = _preparation(trainer, pl_module, loader, transfer)
            return from_folder(choice, num_images, prepare, class_names or class_names_of(trainer, pl_module))
        length = len(loader.dataset)
        if not isinstance(choice, str):
            return draw_indices(loader, checked_indices(choice, length), transfer, inputs)
        pool = candidates(length)
        drawn = draw_indices(loader, pool, transfer, inputs)
        if drawn.labels is None:
            raise ValueError(f"probe_images={choice!r} needs labels, and the validation batches have none")
        model = classifier_of(callable_model(trainer, pl_module), module)
        order, mistaken = _ranked(trainer, model, choice, drawn, inputs)
        if choice == "misclassified" and mistaken < min(num_images, len(order)):
            say(
                f"GMARCallback: {mistaken} of the {len(order)} images looked at are misclassified; the hardest of "
                "the others fill up the probe"
            )
        return draw_indices(loader, [pool[position] for position in order[:num_images]], transfer, inputs)

    try:
        with silenced(trainer, pl_module), undisturbed(pl_module), validating(trainer):
            loader = validation_loader(trainer)
            if loader is None:
                raise ValueError("probe_images needs a validation dataloader; add one, or pass probe_batch")
            return agreed_probe(choose)
    except (ValueError, TypeError, ProbeError) as error:
        raise ConfigurationError(f"GMARCallback: {error}") from error


def indices_of(choice: Choice, probe: ProbeBatch) -> list[int] | None:
    """Which images "hardest" and "misclassified" came to: a resumed run keeps those of its beginning."""
    if not isinstance(choice, str) or probe.names is None:
        return None
    return [int(name.removeprefix("image ")) for name in probe.names]


def _ranked(
    trainer: Trainer,
    model: nn.Module,
    choice: Literal["hardest", "misclassified"],
    drawn: ProbeBatch,
    inputs: Inputs,
) -> tuple[list[int], int]:
    assert drawn.labels is not None

    def run(rows: Tensor) -> Any:
        return forward(model, model_inputs(model, drawn.part(rows.tolist()), inputs))

    with torch.no_grad(), trainer.precision_plugin.forward_context():
        return ranked(choice, run, torch.arange(len(drawn)), drawn.labels)


def _preparation(trainer: Trainer, pl_module: LightningModule, loader: Any, transfer: Any) -> Any:
    """What the validation set does to a photograph: its own transform, or the same size and normalisation."""
    dataset = loader.dataset
    while hasattr(dataset, "dataset"):  # a Subset of a set
        dataset = dataset.dataset
    transform = getattr(dataset, "transform", None)
    if callable(transform):
        return transform
    example = draw_indices(loader, [0], transfer).images[0]
    if len(example) != 3:
        raise ValueError(f"probe_images takes photographs of 3 channels, the model takes {len(example)}")
    return plain_preparation((example.shape[1], example.shape[2]), *normalisation_of(trainer, pl_module))
