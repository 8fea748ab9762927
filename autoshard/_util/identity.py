"""Mappings by object identity, for keys that cannot be hashed or whose equality is elementwise: arrays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any, TypeVar

V = TypeVar("V")


class IdentityMap(MutableMapping[Any, V]):
    """A mapping in which a key equals itself only; it holds its keys, in order of insertion."""

    def __init__(self, items: Iterable[tuple[Any, V]] = ()) -> None:
        self._items: dict[int, tuple[Any, V]] = {}
        self.update(items)

    def __getitem__(self, key: Any) -> V:
        return self._items[id(key)][1]

    def __setitem__(self, key: Any, value: V) -> None:
        self._items[id(key)] = (key, value)

    def __delitem__(self, key: Any) -> None:
        del self._items[id(key)]

    def __iter__(self) -> Iterator[Any]:
        return (key for key, _ in self._items.values())

    def __len__(self) -> int:
        return len(self._items)


def distinct(objects: Iterable[Any]) -> list[Any]:
    """The objects without repetitions of the same object, in order."""
    return list(IdentityMap((each, None) for each in objects))
