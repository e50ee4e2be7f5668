"""Tables of heads: as tidy rows, and in arrays that grow without a probe more costing more."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gmar_lightning.monitor.record import ProbeRecord


class GrowingArray:
    """An array `(entries, *shape)` that entries are added to at the end.

    The room doubles when it is full, so that adding n entries copies fewer than 2 n.

    Args:
        shape: Of one entry.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._room = np.empty((16, *shape), dtype=np.float32)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def append(self, entry: np.ndarray) -> None:
        """Add one entry of the array's shape."""
        if self._count == len(self._room):
            self._room = np.concatenate([self._room, np.empty_like(self._room)])
        self._room[self._count] = entry
        self._count += 1

    @property
    def all(self) -> np.ndarray:
        """Every entry so far, `(entries, *shape)`; a read-only view."""
        view = self._room[: self._count]
        view.flags.writeable = False
        return view


class GrowingTables:
    """One growing array for each signal that was asked for."""

    def __init__(self) -> None:
        self._arrays: dict[str, GrowingArray] = {}

    def clear(self) -> None:
        """Forget all, because records were taken away."""
        self._arrays.clear()

    def filled(
        self,
        name: str,
        shape: tuple[int, int],
        records: Sequence[ProbeRecord],
        table: Callable[[ProbeRecord, str], np.ndarray],
    ) -> np.ndarray:
        """The tables of all records, `(probes, layers, heads)`; those that are there already are not read again.

        Args:
            name: Of the signal.
            shape: `(layers, heads)`.
            records: All so far.
            table: Reads one.
        """
        array = self._arrays.get(name)
        if array is None or len(array) > len(records) or array.all.shape[1:] != shape:
            array = self._arrays[name] = GrowingArray(shape)
        for record in records[len(array) :]:
            array.append(table(record, name))
        return array.all


def fitted(table: np.ndarray | None, shape: tuple[int, int]) -> np.ndarray:
    """A table as float32 of `shape`, cut or filled with NaN; all NaN where there is none."""
    whole = np.full(shape, np.nan, dtype=np.float32)
    if table is not None:
        depth, width = min(len(table), shape[0]), min(table.shape[1], shape[1])
        whole[:depth, :width] = table[:depth, :width]
    return whole


def rows_of(
    record: ProbeRecord, layers: Sequence[str], heads: Sequence[int], tables: Mapping[str, np.ndarray]
) -> Iterator[dict[str, Any]]:
    """One tidy row per head of a probe.

    Args:
        record: The probe.
        layers: Module path of each layer.
        heads: Heads of each layer.
        tables: Column name to `(layers, heads)`.
    """
    for layer, width in enumerate(heads):
        for head in range(width):
            yield {
                "step": record.step,
                "global_step": record.global_step,
                "epoch": record.epoch,
                "segment": record.segment,
                "layer": layer,
                "layer_name": layers[layer],
                "head": head,
                **{name: float(table[layer, head]) for name, table in tables.items()},
                "flagged": (layer, head) in record.flagged,
            }


def frame_of(rows: Iterator[dict[str, Any]]) -> Any:
    """Rows as a `pandas.DataFrame`.

    Raises:
        ImportError: pandas is not installed.
    """
    try:
        pandas = importlib.import_module("pandas")
    except ImportError as error:
        raise ImportError("History.to_pandas needs pandas: pip install pandas") from error
    return pandas.DataFrame(list(rows))
