"""The costed program in a plan's JSON, with its sizes by name, for formulas, other sizes and crossovers.

```json
{"sizes": {"B": 64, "E": 18432}, "relations": [],
 "regions": [["main", -1, "1", ""], ["loop", 0, "L", "scan (palm.py:151)"]],
 "values": [["params['embedding']", ["V", "E"], "bfloat16", 2.0, 0, "params['embedding']"]],
 "operations": [{"factors": [["B"], ["F"], ["E", "sum"]], "inputs": [[3, [[0], [2]], 1]], "outputs": [...], ...}]}
```
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autoshard.annotating.fingerprint import place_number
from costmodels.dimensions import Dimensions, rebound
from costmodels.program.program import Factor, Operation, Output, Program, Region, Use, Value

Json = dict[str, Any]


def to_json(program: Program, dimensions: Dimensions) -> Json:
    """A program as plain data, with its sizes by name."""
    regions = zip(program.regions, dimensions.counts, strict=True)
    values = zip(program.values, dimensions.shapes, strict=True)
    operations = zip(program.operations, dimensions.factors, strict=True)
    return {
        "name": program.name,
        "sizes": dict(dimensions.sizes),
        "relations": [list(pair) for pair in dimensions.relations],
        "arguments": list(program.arguments),
        "constants": list(program.constants),
        "results": list(program.results),
        "donated": [list(pair) for pair in program.donated],
        "warnings": list(program.warnings),
        "regions": [
            [each.kind, -1 if each.parent is None else each.parent, count, each.name] for each, count in regions
        ],
        "values": [
            [v.name, list(shape), v.dtype, v.itemsize, v.region, _origin_name(program, v)] for v, shape in values
        ],
        "operations": [_operation_to_json(op, sizes) for op, sizes in operations],
    }


def _origin_name(program: Program, value: Value) -> str:
    return "" if value.origin is None else program.values[value.origin].name


def _operation_to_json(op: Operation, sizes: Sequence[str]) -> Json:
    factors = zip(op.factors, sizes, strict=True)
    return {
        "name": op.name,
        "primitive": op.primitive,
        "factors": [[size] if factor.kind == "parallel" else [size, factor.kind] for factor, size in factors],
        "inputs": list(map(_use_to_json, op.inputs)),
        "outputs": list(map(_use_to_json, op.outputs)),
        "region": op.region,
        "op_class": op.op_class,
        "linear": [sorted(group) for group in op.linear],
        "traffic": list(map(place_number, op.traffic)),
        "flops_per_point": op.flops_per_point,
        "dtype": op.dtype,
        "source": op.source,
        "exact": op.exact,
        **({} if op.pinned is None else {"pinned": [None if dim is None else list(dim) for dim in op.pinned]}),
        **({"masked": list(op.masked)} if op.masked else {}),
        **({"rounded": list(op.rounded)} if op.rounded else {}),
    }


def _use_to_json(use: Use) -> list[Any]:
    stored = [use.stored_itemsize] if use.stored_itemsize else []
    return [use.value, [list(dim) for dim in use.dims], use.region, *stored]


def from_json(data: Json) -> tuple[Program, Dimensions]:
    """The inverse of `to_json`.

    **Raises:** `ValueError`, `TypeError` or `KeyError` for damaged data, without the name of the file.
    """
    operations = data["operations"]
    dimensions = Dimensions(
        tuple(tuple(str(size) for size, *_ in op["factors"]) for op in operations),
        tuple(tuple(map(str, row[1])) for row in data["values"]),
        tuple(str(row[2]) for row in data["regions"]),
        {_text(name): _size(size) for name, size in data["sizes"].items()},
        tuple((str(left), str(right)) for left, right in data["relations"]),
    )
    unsized = Program(
        _text(data["name"]),
        _values(data["values"]),
        tuple(_operation(op) for op in operations),
        tuple(_region(row) for row in data["regions"]),
        tuple(data["arguments"]),
        tuple(data["constants"]),
        tuple(data["results"]),
        tuple((argument, result) for argument, result in data["donated"]),
        tuple(map(_text, data["warnings"])),
    )
    return rebound(unsized, dimensions, {}), dimensions


def _values(rows: Sequence[Any]) -> tuple[Value, ...]:
    """The values; an origin is the first value of its name, because arguments and constants come first."""
    place: dict[str, int] = {}
    for at, (name, *_) in enumerate(rows):
        place.setdefault(_text(name), at)
    return tuple(
        Value(name, (0,) * len(shape), _text(dtype), float(itemsize), int(region), place.get(_text(origin)))
        for name, shape, dtype, itemsize, region, origin in rows
    )


def _region(row: Sequence[Any]) -> Region:
    kind, parent, _, name = row
    return Region(kind, None if int(parent) < 0 else int(parent), 0, _text(name))


def _operation(row: Json) -> Operation:
    return Operation(
        _text(row["name"]),
        _text(row["primitive"]),
        tuple(Factor(0, *kind) for _, *kind in row["factors"]),
        tuple(map(_use, row["inputs"])),
        tuple(map(_use, row["outputs"])),
        int(row["region"]),
        row["op_class"],
        tuple(frozenset(group) for group in row["linear"]),
        tuple(Output(-1 - k) if k < 0 else k for k in row["traffic"]),
        float(row["flops_per_point"]),
        _text(row["dtype"]),
        _text(row["source"]),
        bool(row["exact"]),
        tuple(None if dim is None else tuple(map(_text, dim)) for dim in row["pinned"]) if "pinned" in row else None,
        tuple(row.get("masked", ())),
        tuple(row.get("rounded", ())),
    )


def _use(row: Sequence[Any]) -> Use:
    value, dims, region, *stored = row
    return Use(int(value), tuple(tuple(dim) for dim in dims), int(region), *map(float, stored))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected a string, got {value!r}")
    return value


def _size(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"expected a non-negative integer, got {value!r}")
    return value
