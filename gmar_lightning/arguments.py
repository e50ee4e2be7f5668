"""Checks of what the callback is given: a clear error before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer

from gmar_lightning.explain.candidates import candidates, said
from gmar_lightning.explain.errors import UnsupportedModelError
from gmar_lightning.explain.inputs import Inputs, classifier_of, named_inputs
from gmar_lightning.explain.rollout import Rollout, forms_of
from gmar_lightning.monitor.batches import masks_of, unpack_batch
from gmar_lightning.monitor.probe import ProbeBatch, on_cpu
from gmar_lightning.monitor.schedule import Adaptive, Every
from gmar_lightning.monitor.selection import checked_choice
from gmar_lightning.monitor.settings import ProbeSettings


class ConfigurationError(MisconfigurationException, ValueError):
    """The callback cannot work as it was set up; the message says what to change."""


def check_counts(**counts: Any) -> None:
    """Refuse what is not a whole number of at least 1."""
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigurationError(f"{name} must be a whole number >= 1, got {value!r}")


def given_schedule(steps: Any, epochs: Any, read: Any) -> Every:
    """When to probe: after so many steps (100 when nothing is given) or epochs, or as often as time allows."""
    check_choice("read", read, ("probe", "step"))
    if isinstance(steps, str):
        check_choice("every_n_train_steps", steps, ("auto",), "or a number of steps")
        if epochs is not None or read == "step":
            raise ConfigurationError(
                'every_n_train_steps="auto" takes neither every_n_epochs nor read="step"'
            )
        return Adaptive()
    if read == "step" and epochs is not None:
        raise ConfigurationError('read="step" reads training steps: give every_n_train_steps')
    return Every(steps=100 if steps is None and epochs is None else steps, epochs=epochs)


def check_step_read(read: str, target: Any, **of_probes: Any) -> None:
    """Refuse, where steps are read, what only a probe can answer to."""
    of_probes["target"] = None if target == "predicted" else target
    given = [name for name, value in of_probes.items() if value is not None]
    if read == "step" and given:
        raise ConfigurationError(f'{given[0]} is of probes, and read="step" takes none: leave it out')


def check_faithfulness_every(value: Any) -> None:
    """Refuse what is neither "ends" nor an interval nor None."""
    if isinstance(value, str):
        check_choice("faithfulness_every", value, ("ends",), "or a number of probes, or None")
    elif value is not None:
        check_counts(faithfulness_every=value)


def check_choice(name: str, value: Any, allowed: Sequence[str], other: str = "") -> None:
    """Refuse a name that is not among the allowed ones; `other` says what else is possible."""
    if not isinstance(value, str) or value not in allowed:
        choices = ", ".join(map(repr, allowed))
        raise ConfigurationError(f"{name}={value!r} is unknown; choose one of {choices} {other}".rstrip())


def check_reactions(on_error: Any, on_collapse: Any) -> None:
    """Refuse what is no reaction to a failed probe, or to heads that collapse."""
    check_choice("on_error", on_error, ("warn", "raise"))
    if not callable(on_collapse):
        check_choice("on_collapse", on_collapse, ("warn", "alert", "stop"), "or a callable")


def beside_primary(rollout: Rollout, others: Any) -> tuple[Rollout, ...]:
    """The forms to log beside the primary one, which is logged anyway.

    Raises:
        ValueError: With the forms that exist.
    """
    asked: tuple[Any, ...] = (others,) if isinstance(others, str) else tuple(others)
    return forms_of((rollout, *asked))[1:]


def check_target(target: Any, probe: ProbeBatch | None) -> None:
    """Refuse a target that is neither a choice nor a class index, and labels that are not there."""
    if callable(target):
        return
    if isinstance(target, bool) or not (isinstance(target, int) and target >= 0):
        check_choice("target", target, ("predicted", "label"), "or a class index")
    if target == "label" and probe is not None and probe.labels is None:
        raise ConfigurationError('target="label" needs labels: pass probe_batch=(images, labels)')


def check_display(name: str, values: Any) -> list[float] | None:
    """Channel means or deviations as a list; None stays None."""
    if values is None:
        return None
    try:
        return [float(value) for value in values]
    except (TypeError, ValueError):
        raise ConfigurationError(f"{name} must be one number per channel, got {values!r}") from None


def given_probe(batch: Any, inputs: Inputs = None) -> ProbeBatch | None:
    """The user's own probe batch, kept apart from the tensors it came in."""
    if batch is None:
        return None
    images, labels = unpack_batch(batch, inputs=inputs)
    if len(images) == 0:
        raise ConfigurationError("probe_batch is empty")
    kept = images.detach().cpu().clone()
    masks = masks_of(batch, images)
    labels, masks = (None if part is None else part.detach().cpu().clone() for part in (labels, masks))
    return ProbeBatch(kept, labels, masks=masks, batch=None if inputs is None else on_cpu(batch))


def given_choice(probe_images: Any, probe_batch: Any, whole_batches: bool = False) -> Any:
    """What `probe_images` asks for, checked; None when it asks for nothing."""
    if probe_images is not None and probe_batch is not None:
        raise ConfigurationError("probe_batch and probe_images are two answers to one question: give one")
    choice = None if probe_images is None else checked_choice(probe_images)
    if isinstance(choice, Path) and whole_batches:
        raise ConfigurationError(
            "inputs= takes whole batches, and a folder of probe_images has photographs alone: pass probe_batch, or "
            "indices of the validation set"
        )
    return choice


def check_modules(module: Any, read: str, **by_path: Any) -> tuple[str | None, ...]:
    """The paths that `module` names, one or several, for which each mapping in `by_path` must have an entry."""
    if isinstance(module, str | None):
        paths = (module,)
    else:
        paths = tuple(module) if isinstance(module, Sequence) else ()
        if not paths or not all(isinstance(path, str) and path for path in paths):
            raise ConfigurationError(f"module must be a dotted path or a list of them, got {module!r}")
        if len(set(paths)) < len(paths):
            raise ConfigurationError(f"module={module!r} names a path twice")
        if read == "step":
            raise ConfigurationError('read="step" watches one module: give one path, or read="probe"')
    for name, value in by_path.items():
        if isinstance(value, Mapping) and (missing := [path for path in paths if path not in value]):
            raise ConfigurationError(f"{name} is a mapping from path and has no entry for {missing[0]!r}")
    return paths


def of_path(value: Any, path: str | None) -> Any:
    """What an argument says for one of several modules: a mapping's entry, or the same for all."""
    return value[path] if isinstance(value, Mapping) else value


def check_fit(trainer: Trainer) -> None:
    """Refuse a trainer that the callback cannot work with, before anything is loaded."""
    if trainer.barebones:
        raise ConfigurationError(
            "Trainer(barebones=True) switches everything off that costs time; GMARCallback is such a thing. "
            "Remove one of the two."
        )
    check_strategy(trainer.strategy)


def check_forward(pl_module: LightningModule, settings: ProbeSettings, probe: ProbeBatch | None) -> None:
    """Refuse a LightningModule without a forward when no module inside it is named; say which would work."""
    if settings.module is not None or type(pl_module).forward is not LightningModule.forward:
        return
    children = ", ".join(name for name, _ in pl_module.named_children()) or "none"
    working = ""
    if probe is not None:
        given = named_inputs(probe.part(list(range(min(2, len(probe))))), settings.inputs)
        working = said(candidates(pl_module, given))
    raise ConfigurationError(
        f"{type(pl_module).__name__} defines no forward(images) -> logits. Define one, or name with "
        "GMARCallback(module=...) a submodule that returns class scores, backbone and head together; features "
        f"are explained by a callable target. Its children: {children}. {working}".rstrip()
    )


def named_in_error(error: UnsupportedModelError, path: str | None) -> UnsupportedModelError:
    """The error with the module it is about, where several are watched."""
    return error if path is None else type(error)(f"module={path!r}: {error}")


# By class name, so that nothing is imported: what these do to weights was never tried with a probe.
_STRATEGIES = {
    "DeepSpeedStrategy": "its engine owns forward, backward and weights, which stage 3 partitions",
    "XLAFSDPStrategy": "its sharded weights cannot be gathered for a probe",
    "MegatronStrategy": "it cuts single layers up between processes (tensor and pipeline parallelism)",
    "ColossalAIStrategy": "its engine owns forward, backward and weights",
}


def check_strategy(strategy: Any) -> None:
    """Refuse a strategy under which no process can run the model by itself.

    Args:
        strategy: The trainer's strategy; FSDP and data-parallel ones pass.

    Raises:
        ConfigurationError: Naming the strategy, the reason, and what works.
    """
    names = [kind.__name__ for kind in type(strategy).__mro__]
    reason = next((_STRATEGIES[name] for name in names if name in _STRATEGIES), None)
    if "ModelParallelStrategy" in names:
        size = getattr(strategy, "_tensor_parallel_size", 1)  # "auto" until the processes have met
        if size != 1:
            reason = (
                f"tensor_parallel_size={size!r} splits the heads of a layer between processes, so that no process "
                "sees whole attention maps; with tensor_parallel_size=1 it shards by fully_shard, which works"
            )
    if reason is not None:
        raise ConfigurationError(
            f"GMARCallback cannot work under {type(strategy).__name__}: {reason}. Single-device, DDP, FSDP and "
            "ModelParallelStrategy(tensor_parallel_size=1) are supported."
        )


def check_module(pl_module: LightningModule, module: str | None) -> None:
    """Refuse a path that leads to no submodule."""
    try:
        classifier_of(pl_module, module)
    except ValueError as error:
        raise ConfigurationError(str(error)) from None
