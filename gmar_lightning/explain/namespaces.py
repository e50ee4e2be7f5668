"""Names bound in places that are no plain dictionary: slots, classes, globals and closures, kept and put back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gmar_lightning.explain.state import Saved, same_objects
from gmar_lightning.explain.watched import has_value, is_data


class SavedNames(Saved):
    """Names bound in a namespace that is written with functions of its own: slots, classes, globals, cells.

    Args:
        where: Path of the namespace.
        read: The names that are bound now, with their values.
        write: Binds a name.
        delete: Unbinds a name.
    """

    def __init__(
        self,
        where: str,
        read: Callable[[], dict[str, Any]],
        write: Callable[[str, Any], None],
        delete: Callable[[str], None],
    ) -> None:
        super().__init__(where)
        self._read, self._write, self._delete = read, write, delete
        self._values = read()
        self._lent: list[str] = []

    def lend(self, substitutes: dict[int, Any]) -> None:
        """Bind some names to something else, until `take_back`."""
        self._lent = [name for name, value in self._values.items() if id(value) in substitutes]
        for name in self._lent:
            self._write(name, substitutes[id(self._values[name])])

    def take_back(self) -> None:
        """End what `lend` began."""
        for name in self._lent:
            self._write(name, self._values[name])
        self._lent = []

    @property
    def values(self) -> dict[str, Any]:
        """What was bound."""
        return self._values

    def changed(self) -> bool:
        """See `Saved`."""
        now = self._read()
        names = set(now) == set(self._values)
        return not names or not same_objects(
            [now[name] for name in self._values], list(self._values.values())
        )

    def restore(self) -> None:
        """See `Saved`."""
        now = self._read()
        for name in set(now) - set(self._values):
            self._delete(name)
        for name, value in self._values.items():
            if name not in now or now[name] is not value:
                self._write(name, value)


def saved_slots(where: str, thing: Any, names: tuple[str, ...]) -> SavedNames:
    """The slots of an object, past any `__setattr__` of its class."""

    def read() -> dict[str, Any]:
        return {n: object.__getattribute__(thing, n) for n in names if has_value(thing, n)}

    return SavedNames(
        where,
        read,
        lambda name, value: object.__setattr__(thing, name, value),
        lambda name: object.__delattr__(thing, name),
    )


def saved_class(owner: type) -> SavedNames:
    """The data among the attributes of a class, past any metaclass."""
    return SavedNames(
        owner.__qualname__,
        lambda: {name: value for name, value in vars(owner).items() if is_data(name, value)},
        lambda name, value: type.__setattr__(owner, name, value),
        lambda name: type.__delattr__(owner, name),
    )


def saved_cell(where: str, cell: Any) -> SavedNames:
    """What a function encloses under one name."""

    def read() -> dict[str, Any]:
        try:
            return {"": cell.cell_contents}
        except ValueError:  # a cell that nothing was put in yet
            return {}

    def write(name: str, value: Any) -> None:
        cell.cell_contents = value

    def delete(name: str) -> None:
        del cell.cell_contents

    return SavedNames(where, read, write, delete)


def saved_globals(module: str, namespace: dict[str, Any], names: set[str]) -> SavedNames:
    """Some of the names of a module."""
    return SavedNames(
        module,
        lambda: {name: namespace[name] for name in names if name in namespace},
        namespace.__setitem__,
        namespace.__delitem__,
    )
