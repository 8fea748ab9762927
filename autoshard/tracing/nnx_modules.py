"""Flax NNX modules, optimizers and random streams as arguments: their state in, their new state out, as `nnx.jit` does.

Flax is not imported here: arguments have modules only if the user has imported it.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from autoshard.errors import AutoshardError


def has_modules(value: Any) -> bool:
    """Whether a pytree contains an NNX module, optimizer, metric or random stream."""
    nnx: Any = sys.modules.get("flax.nnx")
    if nnx is None or isinstance(value, jax.Array):
        return False
    kinds = tuple(getattr(nnx, name) for name in ("Pytree", "Object") if hasattr(nnx, name))
    if isinstance(value, kinds):
        return True
    leaves = jax.tree_util.tree_leaves(value, is_leaf=lambda each: isinstance(each, kinds))
    return any(isinstance(leaf, kinds) for leaf in leaves)


@dataclass(frozen=True)
class Modules:
    """The modules of a call.

    **Attributes:**

    - `nodes`: the arguments that contain modules.
    - `graph`: their structure, with the variables that they share; hashable.
    - `states`: their arrays, per argument. A shared variable belongs to the first.
    """

    nodes: tuple[Any, ...]
    graph: Any
    states: tuple[Any, ...]

    @classmethod
    def of(cls, nodes: Sequence[Any]) -> Modules:
        """The modules in these arguments."""
        nnx: Any = sys.modules["flax.nnx"]
        graph, state = nnx.split(tuple(nodes))
        return cls(tuple(nodes), graph, tuple(state[i] if i in state else nnx.State({}) for i in range(len(nodes))))

    def pure(
        self, fn: Callable[..., Any], at: Sequence[int], args: Sequence[Any], donated: Sequence[int]
    ) -> Callable[..., Any]:
        """`fn` as a function of states, which also returns the arrays that it changes, and all of donated arguments.

        **Raises:** `AutoshardError` if `fn` changes the structure of a module.
        """
        probe = _Pure(fn, self, tuple(at), None)
        jax.eval_shape(probe, *args)
        owners = [
            position for position, state in zip(at, self.states, strict=True) for _ in jax.tree_util.tree_leaves(state)
        ]
        kept = tuple(k for k, owner in enumerate(owners) if owner in donated or k in probe.changed)
        return _Pure(fn, self, tuple(at), kept)

    def update(self, function: Callable[..., Any], states: Sequence[Any], result: Any) -> Any:
        """Writes the state after a call into the modules; returns the user's result."""
        nnx: Any = sys.modules["flax.nnx"]
        own, changed = result
        leaves, structure = jax.tree_util.tree_flatten(list(states))
        for k, leaf in zip(function.kept, changed, strict=True):  # pyright: ignore[reportFunctionMemberAccess]
            leaves[k] = leaf
        after = jax.tree_util.tree_unflatten(structure, leaves)
        nnx.update(
            self.nodes, nnx.State({i: state for i, state in enumerate(after) if jax.tree_util.tree_leaves(state)})
        )
        return own


class _Pure:
    """A function of states in place of modules, which returns its result and the kept arrays of the new states."""

    def __init__(
        self, fn: Callable[..., Any], modules: Modules, at: tuple[int, ...], kept: tuple[int, ...] | None
    ) -> None:
        self._fn, self._graph, self._at, self.kept = fn, modules.graph, at, kept
        self.changed: frozenset[int] = frozenset()
        functools.update_wrapper(self, fn)
        self.__signature__ = inspect.signature(fn)

    def __call__(self, *args: Any) -> Any:
        nnx: Any = sys.modules["flax.nnx"]
        states = [args[i] for i in self._at]
        before = jax.tree_util.tree_leaves(states)
        whole = {i: state for i, state in enumerate(states) if jax.tree_util.tree_leaves(state)}
        # Leaves are copied into new variables: `merge` would write into those of the caller.
        fresh = jax.tree_util.tree_map(lambda leaf: leaf, nnx.State(whole))
        nodes = nnx.merge(self._graph, fresh)
        given = list(args)
        for i, node in zip(self._at, nodes, strict=True):
            given[i] = node
        result = self._fn(*given)
        graph, state = nnx.split(nodes)
        after = jax.tree_util.tree_leaves(state)
        if graph != self._graph or len(after) != len(before):
            raise AutoshardError(_structure_changed(getattr(self._fn, "__name__", str(self._fn)), whole, state))
        self.changed = frozenset(k for k, (a, b) in enumerate(zip(before, after, strict=True)) if a is not b)
        if self.kept is None:
            return result
        missing = self.changed - set(self.kept)
        if missing:
            raise AutoshardError(f"{self._fn} must change the same variables in every trace.")
        return result, [after[k] for k in self.kept]


def _structure_changed(name: str, before: Any, after: Any) -> str:
    def paths(state: Any) -> set[str]:
        return {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(dict(state))[0]}

    more, fewer = sorted(paths(after) - paths(before)), sorted(paths(before) - paths(after))
    what = (
        f"adds {', '.join(more)}" if more else f"removes {', '.join(fewer)}" if fewer else "changes a Python attribute"
    )
    return (
        f"{name} changes the structure of its NNX modules ({what}), which a planned function cannot do. Create all variables"
        " before the call, keep counters in nnx.Variable, or return the new value."
    )
