"""The probe images: drawn once, class-balanced, the same for the whole run."""

from __future__ import annotations

import hashlib
import io
import itertools
import pickle
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset

from gmar_lightning.explain.errors import UnsupportedModelError
from gmar_lightning.explain.inputs import Inputs
from gmar_lightning.explain.isolation import isolated_random_state, kept
from gmar_lightning.explain.nested import joined_batches, leaves_of, mapped, rows_of
from gmar_lightning.monitor.batches import masks_of, unpack_batch
from gmar_lightning.monitor.processes import of_first_process, on_every_process

# Candidates read per probe image when a data set does not say its labels up front.
_CANDIDATES = 4
# Bytes from which an array of a data set is taken for its images, not for its state.
_LARGE = 1 << 20


@dataclass(frozen=True, eq=False)
class ProbeBatch:
    """Images every probe of a run explains.

    Attributes:
        images: `(images, channels, height, width)`, on the CPU, as the model receives them.
        labels: `(images,)` class indices, or None.
        available: How many images the validation set had, where that is known.
        names: What captions call each image, where somebody chose them; not part of the fingerprint.
        masks: Boolean `(images, height, width)`, where the evidence lies, from batches that say so; the border is
            drawn on the pictures. Not part of the fingerprint.
        batch: The whole batch, where a callable makes of it what the model takes; the images are those it made.
    """

    images: Tensor
    labels: Tensor | None = None
    available: int | None = None
    names: tuple[str, ...] | None = None
    masks: Tensor | None = None
    batch: Any = None

    def __len__(self) -> int:
        return len(self.images)

    def part(self, rows: list[int]) -> Any:
        """What `gmar` takes of some of the images."""
        return self.images[rows] if self.batch is None else rows_of(self.batch, rows, len(self))

    @property
    def fingerprint(self) -> str:
        """Digest of images and labels, and of all else that the model takes: equal exactly when they are."""
        digest = hashlib.sha256(str(tuple(self.images.shape)).encode())
        digest.update(self.images.float().contiguous().numpy().tobytes())
        if self.labels is not None:
            digest.update(self.labels.long().contiguous().numpy().tobytes())
        for path, leaf in leaves_of(self.batch).items() if self.batch is not None else ():
            content = leaf.float().contiguous().numpy().tobytes() if isinstance(leaf, Tensor) else repr(leaf)
            digest.update(f"{path} {content!r}".encode())
        return digest.hexdigest()[:16]


def draw_probe(
    loader: Any, num_images: int, transfer: Callable[[Any], Any] | None = None, inputs: Inputs = None
) -> ProbeBatch:
    """Draw a class-balanced batch from a validation loader's data set, without touching any random stream.

    The loader itself is never iterated: starting its workers would move the random state and with it the
    training. Its data set is read through a copy (which shares arrays and tensors), as a data set may hold a
    random generator, a cache or a position of its own. Random transforms see a fixed seed, so that a resumed
    run finds the same images.

    Args:
        loader: A `DataLoader`, or a list of batches.
        num_images: How many; all there are when there are fewer.
        transfer: What happens to a batch on its way to the model (device, batch-transfer hooks).
        inputs: Makes of a batch what the model takes, see `gmar`.

    Returns:
        The batch, classes taking turns.

    Raises:
        ValueError: When images cannot be found in the batches, or the loader cannot be read without
            disturbing it.
    """
    try:
        # What cannot be copied is read itself, and put back: generators, counters, positions, open files.
        with isolated_random_state(seed=0), kept(_roots(loader)):
            batch, positions, available = _drawn(loader, num_images, inputs)
            batch = batch if transfer is None else transfer(batch)
            images, labels = unpack_batch(batch, positions, inputs)
            masks = masks_of(batch, images)
    except UnsupportedModelError as error:
        raise ValueError(f"{error} Pass probe_batch=(images, labels).") from error
    rows = (
        list(range(min(num_images, len(images))))
        if labels is None
        else _balanced(labels.tolist(), num_images)
    )

    def chosen(values: Tensor | None) -> Tensor | None:
        # Indexing copies, so that nothing of the data set stays alive with the probe.
        return None if values is None else values.detach().cpu()[rows].clone()

    kept_batch = None if inputs is None else on_cpu(rows_of(batch, rows, len(images)))
    first = images.detach().cpu()[rows].clone()
    return ProbeBatch(first, chosen(labels), available, masks=chosen(masks), batch=kept_batch)


def on_cpu(batch: Any) -> Any:
    """A copy of a nested batch, detached and on the CPU."""
    return mapped(batch, lambda tensor: tensor.detach().cpu().clone())


def draw_indices(
    loader: Any,
    indices: Sequence[int],
    transfer: Callable[[Any], Any] | None = None,
    inputs: Inputs = None,
) -> ProbeBatch:
    """The images of a validation loader's data set at these indices, in this order, as `draw_probe` reads them.

    Raises:
        ValueError: When the data set cannot be read by index, or images cannot be found in its batches.
    """
    indexed = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
    if not indexed or loader.batch_sampler is None:
        raise ValueError(
            "probe_images needs a validation set that is read by index; pass probe_batch instead"
        )
    with isolated_random_state(seed=0), kept(_roots(loader)):
        dataset, collate = _private_copy((loader.dataset, loader.collate_fn))
        batch = collate([dataset[index] for index in indices])
        batch = batch if transfer is None else transfer(batch)
        images, labels = unpack_batch(batch, indices, inputs)
        masks = masks_of(batch, images)
    names = tuple(f"image {index}" for index in indices)
    images, labels, masks = (
        None if part is None else part.detach().cpu().clone() for part in (images, labels, masks)
    )
    assert images is not None
    return ProbeBatch(images, labels, len(dataset), names, masks, None if inputs is None else on_cpu(batch))


def agreed_probe(draw: Callable[[], ProbeBatch]) -> ProbeBatch:
    """Draw the probe images on every process; where they differ, all take those of the first.

    They differ when a data set gives each process its own part.

    Raises:
        ProbeError: When the drawing failed on another process; a failure here is raised as it is.
    """
    drawn: list[ProbeBatch] = []

    def fingerprint() -> str:
        drawn.append(draw())
        return drawn[0].fingerprint

    alike = len(set(on_every_process(fingerprint))) == 1
    return drawn[0] if alike else of_first_process(drawn[0])


def _roots(loader: Any) -> dict[str, Any]:
    if not isinstance(loader, DataLoader):
        return {"loader": loader}
    return {"dataset": loader.dataset, "collate_fn": loader.collate_fn, "generator": loader.generator}


def _drawn(loader: Any, num_images: int, inputs: Inputs) -> tuple[Any, list[int], int | None]:
    """A batch, the positions of its samples in the data set where they are known, and how many there are."""
    merged = _merged if inputs is None else _joined
    if not isinstance(loader, DataLoader):
        return merged(itertools.islice(_iterated(loader), num_images)), [], None
    streams = isinstance(loader.dataset, IterableDataset)
    dataset, collate = _private_copy((loader.dataset, loader.collate_fn))
    if streams:
        return _from_stream(loader, dataset, collate, num_images, merged), [], None
    if loader.batch_sampler is None:  # items are batches
        return merged(dataset[i] for i in range(min(num_images, len(dataset)))), [], None
    if len(dataset) == 0:
        raise ValueError("the validation set is empty; pass probe_batch=(images, labels)")
    positions, items = _readable(dataset, *_candidates(dataset, num_images))
    return collate(items), positions, len(dataset)


def _iterated(loader: Any) -> Any:
    """Batches of anything that iterates, from a copy of it; a one-way stream that cannot be copied is refused."""
    if isinstance(loader, (list, tuple)):
        return loader
    if not hasattr(type(loader), "__iter__") and not hasattr(type(loader), "__getitem__"):
        raise ValueError(f"a {type(loader).__name__} does not iterate; pass probe_batch=(images, labels)")
    copied = _private_copy(loader)
    if copied is loader and hasattr(type(loader), "__next__"):
        raise ValueError(
            f"cannot draw probe images from a {type(loader).__name__} without disturbing it: it can be neither "
            "copied nor started again; pass probe_batch=(images, labels)"
        )
    return iter(copied)


def _readable(dataset: Any, order: Sequence[int], wanted: int) -> tuple[list[int], list[Any]]:
    """The first samples, in this order, that can be read.

    A sample that training never draws (a subset sampler, `limit_val_batches`) may be one that cannot be read.
    """
    positions, items, failure = list[int](), list[Any](), None
    for index in order:
        try:
            items.append(dataset[index])
        except Exception as error:
            failure = error
            continue
        positions.append(index)
        if len(items) == wanted:
            break
    if not items and failure is not None:
        raise failure
    return positions, items


def _from_stream(
    loader: DataLoader,
    stream: Any,
    collate: Callable[[Any], Any],
    num_images: int,
    merged: Callable[[Any], Any],
) -> Any:
    items = list(itertools.islice(stream, _CANDIDATES * num_images))
    if not items:
        raise ValueError("the validation stream is empty; pass probe_batch=(images, labels)")
    return merged(items) if loader.batch_size is None else collate(items)


def _private_copy(original: Any) -> Any:
    """A copy whose reading leaves the original as it is; the original where copying fails."""
    buffer, shared = io.BytesIO(), list[Any]()
    try:
        _Copier(buffer, shared).dump(original)
        buffer.seek(0)
        return _Reader(buffer, shared).load()
    except Exception:
        return original


class _Copier(pickle.Pickler):
    """Pickles by value what has state, and by reference what is large or cannot change."""

    _BY_REFERENCE = (str, bytes, type, ModuleType, FunctionType, BuiltinFunctionType)

    def __init__(self, buffer: io.BytesIO, shared: list[Any]) -> None:
        super().__init__(buffer, protocol=pickle.HIGHEST_PROTOCOL)
        self._shared = shared

    def persistent_id(self, obj: Any) -> int | None:
        large = isinstance(obj, (Tensor, np.ndarray)) and obj.nbytes > _LARGE
        if not large and not isinstance(obj, self._BY_REFERENCE):
            return None
        self._shared.append(obj)
        return len(self._shared) - 1


class _Reader(pickle.Unpickler):
    def __init__(self, buffer: io.BytesIO, shared: list[Any]) -> None:
        super().__init__(buffer)
        self._shared = shared

    def persistent_load(self, pid: int) -> Any:
        return self._shared[pid]


def _candidates(dataset: Any, num_images: int) -> tuple[list[int], int]:
    """Positions in the order they are tried, and how many of them are wanted."""
    known = _known_labels(dataset)
    if known is not None:
        return _balanced(known, len(known)), min(num_images, len(known))
    count = min(len(dataset), _CANDIDATES * num_images)
    spread = [index * len(dataset) // count for index in range(count)]
    return spread, count


def _known_labels(dataset: Any) -> list[Any] | None:
    """Labels that a data set says without loading its images."""
    if isinstance(dataset, Subset):
        inner = _known_labels(dataset.dataset)
        return None if inner is None else [inner[index] for index in dataset.indices]
    for name in ("targets", "labels"):
        labels = getattr(dataset, name, None)
        labels = labels.tolist() if isinstance(labels, (Tensor, np.ndarray)) else labels
        if isinstance(labels, Sequence) and len(labels) == len(dataset) and _are_classes(labels):
            return list(labels)
    return None


def _are_classes(labels: Sequence[Any]) -> bool:
    # Not lists of several labels, boxes or captions per image.
    return all(isinstance(label, (int, np.integer)) for label in labels)


def _balanced(labels: Sequence[Any], num_images: int) -> list[int]:
    """Indices with the classes taking turns, each class in data-set order."""
    of_class: dict[Any, list[int]] = {}
    for index, label in enumerate(labels):
        of_class.setdefault(label, []).append(index)
    turns = itertools.zip_longest(*(of_class[label] for label in sorted(of_class)))
    return [index for index in itertools.chain.from_iterable(turns) if index is not None][:num_images]


def _joined(batches: Iterable[Any]) -> Any:
    drawn = list(batches)
    if not drawn:
        raise ValueError("the validation set is empty; pass probe_batch")
    return joined_batches(drawn)


def _merged(batches: Iterable[Any]) -> Any:
    pairs = [unpack_batch(batch) for batch in batches]
    if not pairs:
        raise ValueError("the validation set is empty; pass probe_batch=(images, labels)")
    images = torch.cat([images for images, _ in pairs])
    labels = [labels for _, labels in pairs if labels is not None]
    return (images, torch.cat(labels)) if len(labels) == len(pairs) else (images,)
