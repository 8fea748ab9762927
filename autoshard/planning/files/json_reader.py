"""Readers of JSON objects and records, with errors that locate the wrong value."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields
from typing import Any


class Reader:
    """A reader of a JSON object, with errors that locate a missing key or a value of the wrong type."""

    def __init__(self, data: Any, where: str) -> None:
        if not isinstance(data, dict):
            raise ValueError(f"{where or 'it'} must be an object, got {shorten(data)}")
        self.data, self.where = data, where

    def get(self, key: str, kind: type | tuple[type, ...]) -> Any:
        at = f"{self.where}.{key}" if self.where else key
        if key not in self.data:
            raise ValueError(f"{at} is missing")
        value = self.data[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{at} has the wrong type: {shorten(value)}")
        return value

    def float(self, key: str) -> float:
        value = self.get(key, (int, float, str))
        if isinstance(value, str) and value not in ("inf", "-inf", "nan"):
            raise ValueError(f"{self.where}.{key} must be a number, got {shorten(value)}")
        return float(value)

    def names(self, key: str) -> tuple[str, ...]:
        found = self.get(key, list)
        if not all(isinstance(each, str) for each in found):
            raise ValueError(f"{self.where}.{key} must be a list of names, got {shorten(found)}")
        return tuple(found)

    def counts(self, key: str) -> tuple[int, ...]:
        found = self.get(key, list)
        if not all(type(each) is int and each >= 0 for each in found):
            raise ValueError(f"{self.where}.{key} must be a list of non-negative integers, got {shorten(found)}")
        return tuple(found)

    def each(self, key: str) -> Iterator[Reader]:
        at = f"{self.where}.{key}" if self.where else key
        return (Reader(entry, f"{at}[{i}]") for i, entry in enumerate(self.get(key, list)))

    def inner(self, key: str) -> Reader:
        return Reader(self.get(key, dict), f"{self.where}.{key}" if self.where else key)


def shorten(value: Any) -> str:
    """A value as JSON of at most 60 characters, for messages."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def read_record(kind: type, reader: Reader, **special: Callable[[Reader], Any]) -> Any:
    """A frozen record from an object with its fields; `special` reads the fields of other types than text and numbers."""
    plain: Mapping[str, Callable[[str], Any]] = {
        "str": lambda key: reader.get(key, str),
        "int": lambda key: reader.get(key, int),
        "bool": lambda key: reader.get(key, bool),
        "bool | None": lambda key: None if reader.data[key] is None else reader.get(key, bool),
        "int | None": lambda key: None if reader.data[key] is None else reader.get(key, int),
        "float": reader.float,
        "tuple[str, ...]": reader.names,
        "tuple[int, ...]": reader.counts,
    }
    values = {
        f.name: special[f.name](reader) if f.name in special else plain[str(f.type)](f.name)
        for f in fields(kind)
        if f.name in reader.data or f.name in special or f.default is MISSING
    }
    return kind(**values)
