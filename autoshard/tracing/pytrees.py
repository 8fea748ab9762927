"""The structure of a pytree as plain data, for plan files.

| node | as data |
|---|---|
| array | `"*"` |
| `None` | `null` |
| list, tuple | `{"list": [child, ...]}`, `{"tuple": [child, ...]}` |
| dict with string keys | `{"dict": {"key": child, ...}}`, in JAX's order |
| dict with other keys, `OrderedDict` | `{"items": [[key, child], ...]}`, `{"ordered": [[key, child], ...]}` |
| namedtuple | `{"namedtuple": "module:Name", "fields": {"field": child, ...}}` |
| any other registered node | `{"custom": "module:Name", "children": {"key": child, ...}}` |

Everything but the last row is rebuilt. A custom node is rebuilt as a dict by path, because only its own class can make
one. So is a namedtuple whose module is not imported.
"""

from __future__ import annotations

import inspect
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

Data = Any
"""A tree's structure: strings, `None`, lists and dicts with string keys, as above."""

LEAF = "*"


@dataclass(frozen=True)
class Nesting:
    """The structure of the arguments or of the results.

    - `data`: the structure as plain data, for plan files.
    - `treedef`: JAX's own structure, with custom nodes; `None` in a plan from a file.
    """

    data: Data
    treedef: Any = field(default=None, repr=False, compare=False)

    @property
    def unknown_class(self) -> str | None:
        """The name of the first class that `rebuild` replaces by a dict; `None` when it rebuilds everything."""
        return None if self.treedef is not None else unknown_class(self.data)

    def rebuild(self, leaves: Sequence[Any]) -> Any:
        """A pytree of this structure with these leaves, in JAX's order.

        **Raises:** `ValueError` when there are more or fewer leaves than the structure has.
        """
        if self.treedef is not None:
            return jax.tree_util.tree_unflatten(self.treedef, leaves)
        return rebuild(self.data, leaves)


def nesting_of(tree: Any) -> Nesting:
    """The structure of a pytree, as both plain data and a `treedef`."""
    return Nesting(describe(tree), jax.tree_util.tree_structure(tree))


def describe(tree: Any) -> Data:
    """The structure of a pytree as plain data."""
    if tree is None:
        return None
    found = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: node is not tree)[0]
    if len(found) == 1 and found[0][0] == ():
        return LEAF
    keys, children = [path[0] for path, _ in found], [describe(child) for _, child in found]
    kind: Any = type(tree)
    if kind in (list, tuple):
        return {kind.__name__: children}
    if kind in (dict, OrderedDict):
        names = [key.key for key in keys]
        if kind is dict and all(type(name) is str for name in names):
            return {"dict": dict(zip(names, children, strict=True))}
        if all(type(name) in (str, int, bool) for name in names):
            return {"items" if kind is dict else "ordered": [list(pair) for pair in zip(names, children, strict=True)]}
    if _is_namedtuple(kind):
        return {"namedtuple": _class_name(kind), "fields": dict(zip(tree._fields, children, strict=True))}
    return {"custom": _class_name(kind), "children": dict(zip(_distinct(keys), children, strict=True))}


def rebuild(data: Data, leaves: Sequence[Any]) -> Any:
    """A pytree of this structure with these leaves, in JAX's order; custom nodes become dicts.

    **Raises:** `ValueError` when there are more or fewer leaves than the structure has.
    """
    if len(leaves) != leaf_count(data):
        raise ValueError(f"expected {leaf_count(data)} arrays for this structure, got {len(leaves)}")
    return _rebuild(data, iter(leaves))


def _rebuild(data: Data, leaves: Iterator[Any]) -> Any:
    if data is None:
        return None
    if data == LEAF:
        return next(leaves)
    match next(iter(data)):
        case "list":
            return [_rebuild(child, leaves) for child in data["list"]]
        case "tuple":
            return tuple(_rebuild(child, leaves) for child in data["tuple"])
        case "dict":
            return {key: _rebuild(child, leaves) for key, child in data["dict"].items()}
        case "items":
            return {key: _rebuild(child, leaves) for key, child in data["items"]}
        case "ordered":
            return OrderedDict((key, _rebuild(child, leaves)) for key, child in data["ordered"])
        case "namedtuple":
            fields = {key: _rebuild(child, leaves) for key, child in data["fields"].items()}
            known = namedtuple_class(data)
            return known(**fields) if known else fields
        case _:
            return {key: _rebuild(child, leaves) for key, child in data["children"].items()}


def leaf_count(data: Data) -> int:
    """The number of arrays in a structure."""
    return 1 if data == LEAF else sum(leaf_count(child) for child in _children(data))


def paths(data: Data) -> list[tuple[str, ...]]:
    """The path of keys to each array, as text, in JAX's order."""
    if data == LEAF:
        return [()]
    keyed = zip(_keys(data), _children(data), strict=True) if data is not None else ()
    return [(key, *path) for key, child in keyed for path in paths(child)]


def _keys(data: Data) -> list[str]:
    content = next(content for content in data.values() if not isinstance(content, str))
    if isinstance(content, dict):
        return list(content)
    if next(iter(data)) in ("items", "ordered"):
        return [str(key) for key, _ in content]
    return [str(at) for at in range(len(content))]


def unknown_class(data: Data) -> str | None:
    """The name of the first class that `rebuild` replaces by a dict; `None` when it rebuilds everything."""
    if isinstance(data, dict):
        if "custom" in data:
            return data["custom"]
        if "namedtuple" in data and namedtuple_class(data) is None:
            return data["namedtuple"]
    return next((name for child in _children(data) if (name := unknown_class(child))), None)


def checked(data: Data) -> Data:
    """The data unchanged, if they are a structure.

    **Raises:** `ValueError`, with the part that is not a node.
    """
    if data is None or data == LEAF:
        return data
    if not isinstance(data, dict) or frozenset(data) not in _FORMS:
        raise ValueError(f"{str(data)[:80]!r} is not a node of a pytree")
    checks = _FORMS[frozenset(data)]
    if not all(check(data[key]) for key, check in checks.items()):
        raise ValueError(f"{str(data)[:80]!r} is not a node of a pytree")
    for child in _children(data):
        checked(child)
    return data


def _is_pairs(content: Any) -> bool:
    pairs = isinstance(content, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in content)
    return pairs and all(isinstance(key, str | int) for key, _ in content)


_FORMS: dict[frozenset[str], dict[str, Callable[[Any], bool]]] = {
    frozenset(("list",)): {"list": lambda content: isinstance(content, list)},
    frozenset(("tuple",)): {"tuple": lambda content: isinstance(content, list)},
    frozenset(("dict",)): {"dict": lambda content: isinstance(content, dict)},
    frozenset(("items",)): {"items": _is_pairs},
    frozenset(("ordered",)): {"ordered": _is_pairs},
    frozenset(("namedtuple", "fields")): {
        "namedtuple": lambda content: isinstance(content, str),
        "fields": lambda content: isinstance(content, dict),
    },
    frozenset(("custom", "children")): {
        "custom": lambda content: isinstance(content, str),
        "children": lambda content: isinstance(content, dict),
    },
}


def _children(data: Data) -> list[Data]:
    if data is None or data == LEAF:
        return []
    content = next(content for content in data.values() if not isinstance(content, str))
    if isinstance(content, dict):
        return list(content.values())
    return [child for _, child in content] if next(iter(data)) in ("items", "ordered") else content


def _is_namedtuple(kind: type) -> bool:
    return issubclass(kind, tuple) and hasattr(kind, "_fields")


def _class_name(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def namedtuple_class(data: Data) -> Any:
    """The namedtuple class of this name with these fields, if its module is imported already; nothing is imported."""
    module, _, name = data["namedtuple"].partition(":")
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = vars(found).get(part) if hasattr(found, "__dict__") else None
    fits = isinstance(found, type) and _is_namedtuple(found) and found._fields == tuple(data["fields"])  # pyright: ignore
    return found if fits else None


def _distinct(keys: Sequence[Any]) -> list[str]:
    """The children's keys as text, numbered if two have the same text."""
    names = [jax.tree_util.keystr((key,), simple=True) for key in keys]
    return names if len(set(names)) == len(names) else [f"{i}: {name}" for i, name in enumerate(names)]


# --- names of arguments


def positional(fn: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments of a call by position, including those given by keyword.

    **Raises:** `TypeError` for keywords that the function does not have, or that are keyword-only.
    """
    if not keywords:
        return args
    bound = inspect.signature(fn).bind(*args, **keywords)
    bound.apply_defaults()
    if bound.kwargs:
        raise TypeError(
            f"Keyword-only arguments are not supported: {', '.join(bound.kwargs)}. Bind beforehand with functools.partial."
        )
    return bound.args


def argument_paths(fn: Callable[..., Any], args: Sequence[Any]) -> tuple[str, ...]:
    """The path of every flat argument: the parameter's name, then the path inside it, as `params['layers']['wq']`."""
    named = jax.tree_util.tree_flatten_with_path(tuple(args))[0]
    heads = _heads(fn, len(args))
    return tuple(heads[path[0].idx] + jax.tree_util.keystr(path[1:]) for path, _ in named)


def _heads(fn: Callable[..., Any], count: int) -> list[str]:
    """The names of the first `count` positional arguments; those of `*rest` are `rest[0]`, `rest[1]`, ..."""
    try:
        parameters = list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    starred = next((i for i, p in enumerate(parameters) if p.kind is p.VAR_POSITIONAL), len(parameters))
    named = [each.name for each in parameters[:starred]][:count]
    if starred < len(parameters):
        return named + [f"{parameters[starred].name}[{i}]" for i in range(count - len(named))]
    return named + [f"args[{i}]" for i in range(len(named), count)]
