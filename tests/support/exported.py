"""Exported source, read as its readers read it.

| name | is |
|---|---|
| `loaded` | the names that a module of exported source defines |
| `placed` | shardings of specs on a mesh |
| `program` | the text of a compiled program without its metadata |
| `assert_same_program` | the exported specs compile to the planned program |
| `by_rules` | the specs of a tree under partition rules |
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import autoshard


def loaded(source: str) -> dict[str, Any]:
    """What a module of this source defines."""
    found: dict[str, Any] = {}
    exec(compile(source, "exported.py", "exec"), found)
    return found


def is_spec(leaf: Any) -> bool:
    return isinstance(leaf, P)


def placed(mesh: jax.sharding.Mesh, specs: Any) -> Any:
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=is_spec)


def program(jitted: Any, args: Any) -> str:
    """The compiled program, without the lines that say where it is from."""
    text = jitted.lower(*args).compile().as_text()
    return re.sub(r", metadata=\{[^}]*\}|^HloModule \S+|\n(File|Function|Stack)[\s\S]*?\n\n", "", text, flags=re.M)


def assert_same_program(plan: autoshard.Plan, fn: Callable[..., Any], args: Any, ins: Any, outs: Any = None) -> None:
    """`plan.apply(fn)` with these specs compiles to what `plan.jit(fn)` does."""
    mesh = plan.make_mesh()
    wanted, results = plan.shardings(mesh)
    assert placed(mesh, ins) == wanted
    exported = jax.jit(
        plan.apply(fn),
        in_shardings=placed(mesh, ins),
        out_shardings=results if outs is None else placed(mesh, outs),
        donate_argnums=plan.donate_argnums,
    )
    assert program(exported, args) == program(plan.jit(fn, mesh), args)


def by_rules(rules: Any, tree: Any) -> Any:
    """What libraries with partition rules do: the first that `re.search` finds; none is an error, scalars stay whole."""

    def spec(path: Any, leaf: Any) -> P:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return next(spec for pattern, spec in rules if re.search(pattern, name))

    return jax.tree_util.tree_map_with_path(spec, tree)


NAMES = {
    "embedding": ("vocab", "embed"),
    "layers/norm": ("layers", "norm"),
    "layers/(gate|up)": ("layers", "embed", "mlp"),
    "layers/down": ("layers", "mlp", "embed"),
    "layers/w[kv]": ("layers", "embed", "kv_heads", "head_dim"),
    "layers/wq": ("layers", "embed", "kv_heads", "queries", "head_dim"),
    "layers/wo": ("layers", "kv_heads", "queries", "head_dim", "embed"),
}
