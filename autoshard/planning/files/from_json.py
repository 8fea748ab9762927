"""A plan from the plain data of its JSON, with every value checked."""

from __future__ import annotations

from typing import Any

from autoshard.annotating.fingerprint import fingerprint
from autoshard.annotating.padding import Padding
from autoshard.planning.carriage import Carriage, CarriedProgram, Constraint
from autoshard.planning.emission import BY_DEFAULT, Emission
from autoshard.planning.files import program_file
from autoshard.planning.files.json_reader import Reader, read_record, shorten
from autoshard.planning.files.to_json import RESULT_SIDE
from autoshard.planning.records import ArrayPlan, Baseline, Estimate, OperationPlan, PlannedCollective, PlanRecord
from autoshard.tracing import pytrees
from autoshard.tracing.pytrees import Nesting
from costmodels.dimensions import Dimensions
from costmodels.machine.topology import Topology, topology_from_dict
from costmodels.program.grouped import CHAIN
from costmodels.program.program import Program
from search.answer.assignment import Choice
from search.formulation.layouts import Axes, Layout
from search.formulation.strategies import LoopedSide, Strategy
from search.solve import Proof

_NUMBER = (int, float)
_AXIS: dict[str, Any] = {
    "name": str,
    "size": int,
    "wraparound": bool,
    "bytes_per_second": _NUMBER,
    "hop_seconds": _NUMBER,
    "launch_seconds": _NUMBER,
}


def from_json(reader: Reader) -> PlanRecord:
    """A plan from its JSON object.

    **Raises:** `ValueError` and the like, with the place, for damaged data.
    """
    topology = _topology(reader.inner("topology"))
    operations = tuple(
        read_record(OperationPlan, row, splits=lambda row: _operation_splits(topology, row))
        for row in reader.each("operations")
    )
    carried = [tuple(tuple(axes) for axes in _axis_lists(topology, row)) for row in reader.each("operations")]
    looped: list[LoopedSide | None] = [_looped(row) for row in reader.each("operations")]
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
        estimate=read_record(Estimate, reader.inner("estimate"), collectives=_collectives, slices=_slices),
        proof=read_record(Proof, reader.inner("proof")),
        operations=operations,
        donate_argnums=reader.counts("donate_argnums"),
        warnings=reader.names("warnings"),
        jax_version=reader.get("jax_version", str),
        program=program,
        dimensions=dimensions,
        padding=_paddings(reader),
        handed_results=reader.counts("handed_results") if "handed_results" in reader.data else (),
        emission=read_record(Emission, reader.inner("emission")) if "emission" in reader.data else BY_DEFAULT,
        carriage=_carriage(topology, reader.inner("carriage")) if "carriage" in reader.data else None,
        baselines=tuple(read_record(Baseline, row) for row in reader.each("baselines"))
        if "baselines" in reader.data
        else (),
    )
    if not isinstance(plan.in_tree.data, dict) or "tuple" not in plan.in_tree.data:
        raise ValueError(f"in_tree must be a tuple of arguments, got {shorten(plan.in_tree.data)}")
    _count("in_tree", pytrees.leaf_count(plan.in_tree.data), "arguments", len(arguments))
    _count("out_tree", pytrees.leaf_count(plan.out_tree.data), "results", len(results))
    return plan


def _carriage(topology: Topology, reader: Reader) -> Carriage:
    def constraints(reader: Reader) -> tuple[Constraint, ...]:
        rows = reader.each("constraints")
        return tuple(read_record(Constraint, row, layouts=lambda row: _layouts(topology, row)) for row in rows)

    def programs(reader: Reader) -> tuple[CarriedProgram, ...]:
        return tuple(read_record(CarriedProgram, row) for row in reader.each("programs"))

    return read_record(Carriage, reader, constraints=constraints, programs=programs)


def _layouts(topology: Topology, reader: Reader) -> tuple[Layout, ...]:
    rows = [Reader({"layout": each}, f"{reader.where}.layouts") for each in reader.get("layouts", list)]
    return tuple(_layout_of(topology, row) for row in rows)


def _program(reader: Reader) -> tuple[Program | None, Dimensions | None]:
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


def _topology(reader: Reader) -> Topology:
    reader.get("name", str)
    for axis in reader.each("axes"):
        for key, kind in _AXIS.items():
            axis.get(key, kind)
    return topology_from_dict(reader.data)


def _count(tree: str, leaves: int, key: str, rows: int) -> None:
    if leaves != rows:
        raise ValueError(f"{tree} has {leaves} arrays, but {key} has {rows}")


def _collectives(reader: Reader, key: str = "collectives") -> tuple[PlannedCollective, ...]:
    return tuple(read_record(PlannedCollective, row) for row in reader.each(key))


def _slices(reader: Reader) -> tuple[PlannedCollective, ...]:
    """The local slices; none in older files, which lack them."""
    return _collectives(reader, "slices") if "slices" in reader.data else ()


def _arrays(topology: Topology, reader: Reader, key: str) -> tuple[ArrayPlan, ...]:
    found = tuple(
        read_record(ArrayPlan, row, layout=lambda row: _layout_of(topology, row), padding=_paddings)
        for row in reader.each(key)
    )
    for array in found:
        if len(array.layout.dims) != len(array.shape):
            raise ValueError(
                f"{array.path} has {len(array.shape)} dimensions, but {len(array.layout.dims)} in its layout"
            )
        if array.order and sorted(array.order) != list(range(len(array.shape))):
            raise ValueError(f"{array.path} has {len(array.shape)} dimensions, but the order {list(array.order)}")
    return found


def _paddings(reader: Reader) -> tuple[Padding, ...]:
    return tuple(read_record(Padding, row) for row in reader.each("padding")) if "padding" in reader.data else ()


def _layout_of(topology: Topology, reader: Reader) -> Layout:
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
            f"{where} must use only {', '.join(topology.axis_sizes)}, each at most once, got {shorten(data)}"
        )
    return splits


def _operation_splits(topology: Topology, row: Reader) -> tuple[Axes, ...]:
    """The axes that split each factor; those of a chain's groups may split its tokens, the last factor, in the same order."""
    data: list[Any] = row.get("splits", list)
    if row.get("primitive", str) != CHAIN or len(data) <= _GROUPS or not data[-1] or not data[_GROUPS]:
        return _splits(topology, data, row.where)
    (groups,) = _splits(topology, [data[_GROUPS]], row.where)
    others = _splits(topology, [*data[:_GROUPS], None, *data[_GROUPS + 1 :]], row.where)
    if tuple(axis for axis in others[-1] if axis in groups) != groups:
        return _splits(topology, data, row.where)
    return (*others[:_GROUPS], groups, *others[_GROUPS + 1 :])


_GROUPS = 1
"""The factor of a chain's groups (`autoshard.rules.ragged`)."""


def _axis_lists(topology: Topology, row: Reader) -> tuple[Axes, ...]:
    return _splits(topology, row.get("carried", list), f"{row.where}.carried")


def _looped(row: Reader) -> LoopedSide | None:
    side: int | None = row.get("looped", int) if "looped" in row.data else None
    return "result" if side == RESULT_SIDE else side
