"""Exports as a pytree of `PartitionSpec`s, in self-contained Python source."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from textwrap import wrap
from typing import Any

from autoshard.carrying.render import export_note
from autoshard.errors import ExportError
from autoshard.explaining.layer_groups import group_arrays
from autoshard.explaining.memory_orders import order_text
from autoshard.export import python
from autoshard.export.arrays import Axes, entries, leaves, mesh_axes
from autoshard.export.python import Group, Source, assignment, literal, sequence
from autoshard.planning.argument_names import heads, position
from autoshard.planning.records import PlanRecord
from autoshard.tracing import pytrees


def render(plan: PlanRecord, argument: str | int | None = None, axes: Axes = None) -> str:
    """`MESH_SHAPE`, and `IN_SPECS` and `OUT_SPECS` for all arguments or `SPECS` for one, nested like the arguments.

    Nodes of other classes, as Flax NNX's states and Equinox's modules, are dicts by the keys of JAX's paths; then the source
    has `like(tree, SPECS)`, which puts the specs into the classes of a tree.

    **Raises:** `ExportError` if a namedtuple's class is not imported.
    """
    imports: set[str] = set()
    if argument is None:
        results = [python.spec(entries(array.layout, axes)) for array in plan.results]
        values = {
            "IN_SPECS": nest(plan.in_tree.data, _specs(plan, None, axes), imports, "The arguments"),
            "OUT_SPECS": nest(plan.out_tree.data, results, imports, "The results"),
        }
        what = f"IN_SPECS are those of the arguments ({', '.join(heads(plan))}), OUT_SPECS those of the result."
    else:
        at = position(plan, argument)
        tree = plan.in_tree.data["tuple"][at]
        values = {"SPECS": nest(tree, _specs(plan, at, axes), imports, f"The arrays of {heads(plan)[at]}")}
        what = f"SPECS are those of {heads(plan)[at]}."
    return module(
        plan, f"The layouts of {plan.name}, planned for {plan.topology.name}.\n\n{what}", axes, imports, values
    )


def _specs(plan: PlanRecord, argument: int | None, axes: Axes) -> list[str]:
    return [python.spec(leaf.spec) for leaf in leaves(plan, argument, axes)]


def module(plan: PlanRecord, doc: str, axes: Axes, imports: set[str], values: dict[str, Source]) -> str:
    """A Python module: its docstring, its imports, `MESH_SHAPE` and some constants."""
    mesh = Group("{", tuple((f"{literal(name)}: ", str(size)) for name, size in mesh_axes(plan, axes).items()), "}")
    quoted = (
        (doc + carriage_note(plan) + padding_note(plan) + _orders_note(plan)).replace("\\", "\\\\").replace('"', "'")
    )
    ending = "\n" if "\n" in quoted else ""
    needed = sorted({*imports, "from jax.sharding import PartitionSpec as P"}, key=_import_order)
    standard = [line for line in needed if "collections" in line]
    others = [line for line in needed if line not in standard]
    blocks = ["\n".join(lines) for lines in (standard, others) if lines]
    constants = "\n".join(assignment(name, value) for name, value in {"MESH_SHAPE": mesh, **values}.items())
    if _LIKE_IMPORT in imports:
        constants += f"\n\n\n{_LIKE}"
    return f'"""{quoted}{ending}"""\n\n' + "\n\n".join([*blocks, constants]) + "\n"


def carriage_note(plan: PlanRecord) -> str:
    """The part of the plan that the specs carry on their own, as a paragraph."""
    return "\n\n" + "\n".join(wrap(export_note(plan), _COLUMNS, break_long_words=False, break_on_hyphens=False))


def padding_note(plan: PlanRecord) -> str:
    """The padded sizes, which a library's configuration must have for these layouts, as a paragraph."""
    arrays = group_arrays(array for array in plan.arguments if array.padding)
    lines = [
        f"  {array.path}: dimension {each.dim} of {each.size} is {each.padded}"
        f"{f', each of {each.inner} elements' if each.inner > 1 else ''}"
        for array, _ in arrays
        for each in array.padding
    ]
    if not lines:
        return ""
    head = (
        "The layouts are of padded arrays. `plan.place(tree)` pads; elsewhere set these sizes in the configuration, such as"
        " a padded_vocab_size or the number of heads, with zeros behind:"
    )
    return "\n\n" + "\n".join([*wrap(head, _COLUMNS), *lines])


_COLUMNS = 96
_LIKE_IMPORT = "import jax"
_LIKE = '''def like(tree, specs):
    """The specs in the classes of a tree with the planned paths, such as an NNX state or a module."""

    def at(path, _):
        found = specs
        for key in path:
            name = jax.tree_util.keystr((key,), simple=True)
            if isinstance(found, (list, tuple)):
                found = found[int(name)]
            else:
                found = found[name] if name in found else found[key.key]
        return found

    return jax.tree_util.tree_map_with_path(at, tree)'''
"""The function of exports with classes that source cannot name."""


def _orders_note(plan: PlanRecord) -> str:
    """The orders of dimensions in memory, which a `PartitionSpec` has no place for."""
    arrays = group_arrays(array for array in plan.arguments if order_text(plan, array))
    lines = [
        f"  {array.path}{f' × {count}' if count > 1 else ''}: {order_text(plan, array)}" for array, count in arrays
    ]
    if not lines:
        return ""
    head = "Orders of dimensions in memory, major to minor; `plan.formats(mesh)` has them as jax.experimental.layout.Format:"
    return "\n\n" + "\n".join([head, *lines])


def _import_order(line: str) -> list[str]:
    return line.split()[1].split(".")


def nest(data: pytrees.Data, leaves: Sequence[Source], imports: set[str], what: str) -> Source:
    """A structure of `autoshard.tracing.pytrees` with these leaves, as source; adds its imports to `imports`.

    **Raises:** `ExportError` for a namedtuple whose class is not imported.
    """
    return _nest(data, iter(leaves), imports, what)


def _nest(data: pytrees.Data, leaves: Iterator[Source], imports: set[str], what: str) -> Source:
    if data is None:
        return "None"
    if data == pytrees.LEAF:
        return next(leaves)

    def pairs(content: Any) -> tuple[tuple[str, Source], ...]:
        return tuple((f"{_key(key)}: ", _nest(child, leaves, imports, what)) for key, child in content)

    kind = next(iter(data))
    match kind:
        case "list" | "tuple":
            items = [_nest(child, leaves, imports, what) for child in data[kind]]
            return sequence(items, "[]" if kind == "list" else "()")
        case "dict" | "items":
            return Group("{", pairs(data[kind].items() if kind == "dict" else data[kind]), "}")
        case "ordered":
            imports.add("from collections import OrderedDict")
            return Group("OrderedDict({", pairs(data[kind]), "})")
        case "namedtuple":
            if pytrees.namedtuple_class(data) is None:  # a file may name any class, and the source would call it
                raise ExportError(_unwritable(data[kind], what))
            name = _import_class(data[kind], imports, what)
            fields = data["fields"].items()
            return Group(f"{name}(", tuple((f"{k}=", _nest(c, leaves, imports, what)) for k, c in fields), ")")
        case _:
            imports.add(_LIKE_IMPORT)
            return Group("{", pairs(data["children"].items()), "}")


def _key(key: Any) -> str:
    return literal(key) if isinstance(key, str) else repr(key)


def _import_class(name: str, imports: set[str], what: str) -> str:
    """The name under which a class is imported."""
    module, _, qualified = name.partition(":")
    if not qualified.isidentifier() or module == "__main__" or not all(map(str.isidentifier, module.split("."))):
        raise ExportError(_unwritable(name, what))
    line = f"from {module} import {qualified}"
    if any(other.endswith(f" import {qualified}") and other != line for other in imports):
        raise ExportError(
            f"{what} are nested in two classes called {qualified}; export rules, or one argument at a time."
        )
    imports.add(line)
    return qualified


def _unwritable(name: str, what: str) -> str:
    return (
        f"{what} nest arrays in {name.replace(':', '.')}, a namedtuple that is not imported and so cannot be written as"
        " source. Import its module, export rules, which need no nesting, or export another argument."
    )
