"""Plans as JSON: versioned, readable and deterministic; loading a plan never executes code.

```json
{"autoshard_plan": 1,
 "name": "decode", "fingerprint": "8f3c...", "jax_version": "0.10.2", "donate_argnums": [1],
 "topology": {"name": "v4:4x4x4", "chip": {...}, "axes": [...]},
 "estimate": {"seconds": 0.0235, ...}, "proof": {"status": "OPTIMAL", ...}, "warnings": [...],
 "arguments": [{"path": "params['layers']['wq']", "shape": [118, 18432, 64, 256], "dtype": "bfloat16",
                "layout": [null, null, ["z", "y", "x"], null], ...}],
 "operations": [{"name": "dot_general params['layers']['wq'] (palm.py:212)", "strategy": "WS-1D: output over xyz",
                 "einsum": "ad,dbc->abc", "splits": [null, ["z", "y", "x"], null, null], ...}],
 "kept": [{"value": 12, "layout": [null, "x"]}], "program": {...}}
```

A layout has one entry per dimension, as a `PartitionSpec` has: null, an axis, or a list of axes, major to minor; partial
sums are `{"dims": [...], "partial": ["x"]}`. An array's "order" has its dimensions in memory, major to minor; an array
without one has the device's default order. Numbers that JSON lacks are the strings "inf", "-inf" and "nan". "program" is
as in `autoshard.planning.program_file`; older files lack it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields
from os import PathLike
from pathlib import Path
from typing import Any

from autoshard._util.files import write_whole
from autoshard.annotating.fingerprint import fingerprint
from autoshard.errors import PlanMismatchError
from autoshard.planning import program_file
from autoshard.planning.emission import BY_DEFAULT, Emission
from autoshard.planning.records import ArrayPlan, Baseline, Estimate, OperationPlan, PlannedCollective, PlanRecord
from autoshard.tracing import pytrees
from autoshard.tracing.pytrees import Nesting
from costmodels.dimensions import Dimensions
from costmodels.machine.topology import Topology, topology_from_dict
from costmodels.program.program import Program
from search.answer.assignment import Choice
from search.formulation.layouts import Axes, Layout
from search.formulation.strategies import Strategy
from search.solve import Proof

VERSION = 1
"""The version of the format; newer versions are rejected."""
_MOST_BYTES = 64 * 2**20
"""The size of the largest file that is read; 126 unrolled layers take 10 MiB."""
_MOST_VALUES = 2**22
"""The largest number of values in a file, counted by commas and brackets: a value takes up to 0.2 KiB of memory."""


_NUMBER = (int, float)
_AXIS: dict[str, Any] = {
    "name": str,
    "size": int,
    "wraparound": bool,
    "bytes_per_second": _NUMBER,
    "hop_seconds": _NUMBER,
    "launch_seconds": _NUMBER,
}

Json = dict[str, Any]


def save(plan: PlanRecord, path: str | PathLike[str]) -> None:
    """Writes a plan to a file atomically: a concurrent reader sees the old file or the new one.

    **Raises:** `OSError` if the file cannot be written; no partial file is left.
    """
    write_whole(Path(path), dumps(plan))


def load(path: str | PathLike[str]) -> PlanRecord:
    """Reads a plan from a file.

    **Raises:** `PlanMismatchError`, with the reason, for anything that is not a plan of this version or an older one;
    `OSError` if there is no such file.
    """
    size = os.stat(path).st_size
    if size > _MOST_BYTES:
        raise PlanMismatchError(f"{path} has {size} bytes; a plan has at most {_MOST_BYTES}.")
    return loads(Path(path).read_bytes(), str(path))


def dumps(plan: PlanRecord) -> str:
    """A plan as JSON text."""
    return _lines(_to_json(plan)) + "\n"


def loads(text: str | bytes, where: str = "The plan") -> PlanRecord:
    """The inverse of `dumps`; `where` names the text in messages.

    **Raises:** `PlanMismatchError`.
    """
    many = sum(text.count(sign if isinstance(text, str) else sign.encode()) for sign in ",[{")  # pyright: ignore
    if many > _MOST_VALUES:
        raise PlanMismatchError(f"{where} has {many} values; a plan has at most {_MOST_VALUES}.")
    try:
        data = json.loads(text, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as error:
        raise PlanMismatchError(f"{where} is not valid JSON, or is truncated: {error}.") from error
    if not isinstance(data, dict) or "autoshard_plan" not in data:
        raise PlanMismatchError(f"{where} is not an autoshard plan: the key autoshard_plan is missing.")
    version = data["autoshard_plan"]
    if type(version) is not int or version < 1:
        raise PlanMismatchError(f"{where} has the invalid version {version!r}; expected {VERSION}.")
    if version > VERSION:
        raise PlanMismatchError(
            f"{where} has version {version}, but this autoshard reads versions up to {VERSION};"
            " update autoshard, or search again."
        )
    try:
        return _from_json(_Reader(data, ""))
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError, AttributeError, IndexError) as error:
        raise PlanMismatchError(f"{where} is damaged: {error}.") from error


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a JSON number")
    return value


def _lines(data: Json) -> str:
    """Readable JSON: one line per entry of the long lists, and per number of the short tables."""

    def compact(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)

    entries = []
    for key, value in data.items():
        if isinstance(value, list) and value and isinstance(value[0], dict | list):
            rows = ",\n  ".join(map(compact, value))
            entries.append(f" {compact(key)}: [\n  {rows}\n ]")
        elif isinstance(value, dict) and key == "program":
            entries.append(f" {compact(key)}: " + _lines(value).replace("\n", "\n "))
        elif isinstance(value, dict) and key in ("estimate", "topology"):
            entries.append(f" {compact(key)}: " + _indented(value))
        else:
            entries.append(f" {compact(key)}: {compact(value)}")
    return "{\n" + ",\n".join(entries) + "\n}"


def _indented(value: Json) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=1).replace("\n", "\n ")


# --- to JSON


def _beyond_splits(strategy: Strategy) -> Json:
    looped = {} if strategy.looped is None else {"looped": strategy.looped}
    return {"carried": [list(axes) for axes in strategy.carried], **looped}


def _to_json(plan: PlanRecord) -> Json:
    rows = zip(plan.operations, plan.choice.strategies, strict=True)
    return {
        "autoshard_plan": VERSION,
        "name": plan.name,
        "fingerprint": plan.fingerprint,
        "jax_version": plan.jax_version,
        "donate_argnums": list(plan.donate_argnums),
        "proof": _plain(plan.proof),
        "warnings": list(plan.warnings),
        "estimate": _plain(plan.estimate),
        "arguments": [_array(array) for array in plan.arguments],
        "constants": [_array(array) for array in plan.constants],
        "results": [_array(array) for array in plan.results],
        "operations": [_plain(row) | _beyond_splits(strategy) for row, strategy in rows],
        "kept": [{"value": value, "layout": _layout(layout)} for value, layout in sorted(plan.choice.hubs.items())],
        "in_tree": plan.in_tree.data,
        "out_tree": plan.out_tree.data,
        "topology": plan.topology.to_dict(),
        **({"emission": _plain(plan.emission)} if plan.emission != BY_DEFAULT else {}),
        **({"baselines": [_plain(each) for each in plan.baselines]} if plan.baselines else {}),
        **_program_to_json(plan),
    }


def _program_to_json(plan: PlanRecord) -> Json:
    if plan.program is None or plan.dimensions is None:
        return {}
    return {"program": program_file.to_json(plan.program, plan.dimensions)}


def _plain(record: Any) -> Json:
    return {field.name: _value(field.name, getattr(record, field.name)) for field in fields(record)}


def _array(array: ArrayPlan) -> Json:
    row = _plain(array)
    return row if array.order else {key: value for key, value in row.items() if key != "order"}


def _value(name: str, value: Any) -> Any:
    if isinstance(value, Layout):
        return _layout(value)
    if name == "splits":
        return [_axes(axes) for axes in value]
    if name == "collectives":
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def _layout(layout: Layout) -> Any:
    dims = [_axes(axes) for axes in layout.dims]
    return {"dims": dims, "partial": list(layout.partial)} if layout.partial else dims


def _axes(axes: Axes) -> str | list[str] | None:
    return None if not axes else axes[0] if len(axes) == 1 else list(axes)


# --- from JSON


class _Reader:
    """A reader of a JSON object, with errors that locate a missing key or a value of the wrong type."""

    def __init__(self, data: Any, where: str) -> None:
        if not isinstance(data, dict):
            raise ValueError(f"{where or 'it'} must be an object, got {_short(data)}")
        self.data, self.where = data, where

    def get(self, key: str, kind: type | tuple[type, ...]) -> Any:
        at = f"{self.where}.{key}" if self.where else key
        if key not in self.data:
            raise ValueError(f"{at} is missing")
        value = self.data[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{at} has the wrong type: {_short(value)}")
        return value

    def float(self, key: str) -> float:
        value = self.get(key, (int, float, str))
        if isinstance(value, str) and value not in ("inf", "-inf", "nan"):
            raise ValueError(f"{self.where}.{key} must be a number, got {_short(value)}")
        return float(value)

    def names(self, key: str) -> tuple[str, ...]:
        found = self.get(key, list)
        if not all(isinstance(each, str) for each in found):
            raise ValueError(f"{self.where}.{key} must be a list of names, got {_short(found)}")
        return tuple(found)

    def counts(self, key: str) -> tuple[int, ...]:
        found = self.get(key, list)
        if not all(type(each) is int and each >= 0 for each in found):
            raise ValueError(f"{self.where}.{key} must be a list of non-negative integers, got {_short(found)}")
        return tuple(found)

    def each(self, key: str) -> Iterator[_Reader]:
        at = f"{self.where}.{key}" if self.where else key
        return (_Reader(entry, f"{at}[{i}]") for i, entry in enumerate(self.get(key, list)))

    def inner(self, key: str) -> _Reader:
        return _Reader(self.get(key, dict), f"{self.where}.{key}" if self.where else key)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _record(kind: type, reader: _Reader, **special: Callable[[_Reader], Any]) -> Any:
    """A frozen record from an object with its fields; `special` reads the fields of other types than text and numbers."""
    plain: Mapping[str, Callable[[str], Any]] = {
        "str": lambda key: reader.get(key, str),
        "int": lambda key: reader.get(key, int),
        "bool": lambda key: reader.get(key, bool),
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


def _from_json(reader: _Reader) -> PlanRecord:
    topology = _topology(reader.inner("topology"))
    operations = tuple(
        _record(OperationPlan, row, splits=lambda row: _splits(topology, row.get("splits", list), row.where))
        for row in reader.each("operations")
    )
    carried = [tuple(tuple(axes) for axes in _axis_lists(topology, row)) for row in reader.each("operations")]
    looped = [row.get("looped", int) if "looped" in row.data else None for row in reader.each("operations")]
    parts = zip((op.splits for op in operations), carried, looped, strict=True)
    strategies = tuple(Strategy(*each) for each in parts)
    hubs = {row.get("value", int): _layout_of(topology, row) for row in reader.each("kept")}
    program, dimensions = _program(reader)
    arguments, constants, results = (_arrays(topology, reader, key) for key in ("arguments", "constants", "results"))
    plan = PlanRecord(
        name=reader.get("name", str),
        topology=topology,
        fingerprint=reader.get("fingerprint", str),
        arguments=arguments,
        constants=constants,
        results=results,
        in_tree=Nesting(pytrees.checked(reader.get("in_tree", dict))),
        out_tree=Nesting(pytrees.checked(reader.get("out_tree", (dict, str, type(None))))),
        choice=Choice(strategies, hubs),
        estimate=_record(Estimate, reader.inner("estimate"), collectives=_collectives),
        proof=_record(Proof, reader.inner("proof")),
        operations=operations,
        donate_argnums=reader.counts("donate_argnums"),
        warnings=reader.names("warnings"),
        jax_version=reader.get("jax_version", str),
        program=program,
        dimensions=dimensions,
        emission=_record(Emission, reader.inner("emission")) if "emission" in reader.data else BY_DEFAULT,
        baselines=tuple(_record(Baseline, row) for row in reader.each("baselines"))
        if "baselines" in reader.data
        else (),
    )
    if not isinstance(plan.in_tree.data, dict) or "tuple" not in plan.in_tree.data:
        raise ValueError(f"in_tree must be a tuple of arguments, got {_short(plan.in_tree.data)}")
    _count("in_tree", pytrees.leaf_count(plan.in_tree.data), "arguments", len(arguments))
    _count("out_tree", pytrees.leaf_count(plan.out_tree.data), "results", len(results))
    return plan


def _program(reader: _Reader) -> tuple[Program | None, Dimensions | None]:
    """The costed program and its dimensions; `None` for older files, which lack them."""
    if "program" not in reader.data:
        return None, None
    try:
        program, dimensions = program_file.from_json(reader.get("program", dict))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"its program cannot be read ({type(error).__name__}: {error})") from error
    if fingerprint(program) != reader.get("fingerprint", str):
        raise ValueError("its program does not match its fingerprint")
    return program, dimensions


def _topology(reader: _Reader) -> Topology:
    reader.get("name", str)
    for axis in reader.each("axes"):
        for key, kind in _AXIS.items():
            axis.get(key, kind)
    return topology_from_dict(reader.data)


def _count(tree: str, leaves: int, key: str, rows: int) -> None:
    if leaves != rows:
        raise ValueError(f"{tree} has {leaves} arrays, but {key} has {rows}")


def _collectives(reader: _Reader) -> tuple[PlannedCollective, ...]:
    return tuple(_record(PlannedCollective, row) for row in reader.each("collectives"))


def _arrays(topology: Topology, reader: _Reader, key: str) -> tuple[ArrayPlan, ...]:
    found = tuple(_record(ArrayPlan, row, layout=lambda row: _layout_of(topology, row)) for row in reader.each(key))
    for array in found:
        if len(array.layout.dims) != len(array.shape):
            raise ValueError(
                f"{array.path} has {len(array.shape)} dimensions, but {len(array.layout.dims)} in its layout"
            )
        if array.order and sorted(array.order) != list(range(len(array.shape))):
            raise ValueError(f"{array.path} has {len(array.shape)} dimensions, but the order {list(array.order)}")
    return found


def _layout_of(topology: Topology, reader: _Reader) -> Layout:
    data = reader.get("layout", (list, dict))
    if isinstance(data, list):
        return Layout(_splits(topology, data, f"{reader.where}.layout"))
    inner = reader.inner("layout")
    return Layout(_splits(topology, inner.get("dims", list), inner.where), inner.names("partial"))


def _splits(topology: Topology, data: list[Any], where: str) -> tuple[Axes, ...]:
    splits = tuple(() if each is None else (each,) if isinstance(each, str) else tuple(each) for each in data)
    used = [axis for axes in splits for axis in axes]
    if len(set(used)) != len(used) or not set(used) <= set(topology.axis_sizes):
        raise ValueError(
            f"{where} must use only {', '.join(topology.axis_sizes)}, each at most once, got {_short(data)}"
        )
    return splits


def _axis_lists(topology: Topology, row: _Reader) -> tuple[Axes, ...]:
    return _splits(topology, row.get("carried", list), f"{row.where}.carried")
