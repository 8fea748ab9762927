"""Calls of a function as users write them, as calls of a function of pytrees of arrays by position.

| argument | treatment |
|---|---|
| positional, by keyword, keyword-only, `*rest`, `**more` | one position each |
| omitted, with a default | the default, as a constant |
| static by `static_argnums` or `static_argnames` | a constant; each value has its own plan |
| a string, a function, a class or a dtype, also as a leaf of a pytree | static |
| a Flax NNX module or optimizer | its state, and the new state as a further result (`autoshard.tracing.nnx_modules`) |
"""

from __future__ import annotations

import enum
import functools
import inspect
import types
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from autoshard.errors import AutoshardError
from autoshard.tracing.nnx_modules import Modules, has_modules

_STATIC_LEAVES = (
    str,
    bytes,
    type,
    np.dtype,
    enum.Enum,
    types.FunctionType,
    types.BuiltinFunctionType,
    functools.partial,
)
"""Types of leaves that are constants, as an activation function in a module."""


@dataclass(frozen=True)
class _Slot:
    """One argument of a call: its parameter, and its index in `*rest` or key in `**more`."""

    parameter: str
    within: int | str | None = None

    @property
    def name(self) -> str:
        return str(self.within) if isinstance(self.within, str) else self.parameter


@dataclass(frozen=True)
class Call:
    """A call as a function of arrays by position.

    **Attributes:**

    - `args`: the pytrees of arrays.
    - `key`: what the function depends on beside the arrays; hashable.
    - `donated`: the donated positions.
    """

    args: tuple[Any, ...]
    key: Hashable
    donated: tuple[int, ...]
    _fn: Callable[..., Any]
    _slots: tuple[tuple[_Slot, Any], ...]
    _constants: Mapping[_Slot, Any]
    _modules: Modules | None = None
    _at: tuple[int, ...] = ()

    def function(self) -> Callable[..., Any]:
        """The function of `args`; with modules its results are the user's and a list of new arrays of their state."""
        run = _Positional(
            self._fn, tuple(slot for slot, _ in self._slots), tuple(of for _, of in self._slots), self._constants
        )
        if self._modules is None:
            return run
        return self._modules.pure(run, self._at, self.args, self.donated)

    def finish(self, function: Callable[..., Any], placed: Sequence[Any], result: Any) -> Any:
        """The user's result; the modules get their new state."""
        if self._modules is None:
            return result
        return self._modules.update(function, [placed[at] for at in self._at], result)


@dataclass(frozen=True)
class _Leaves:
    """The structure of an argument with static leaves: its arrays are the rest."""

    structure: Any
    static: tuple[tuple[int, Any], ...] = ()

    def whole(self, arrays: Any) -> Any:
        if not self.static:
            return arrays
        leaves = self.structure.flatten_up_to(arrays)
        for at, leaf in self.static:
            leaves[at] = leaf
        return self.structure.unflatten(leaves)


class _Positional:
    """A function of the array arguments of a call by position, with the names of the parameters."""

    def __init__(
        self,
        fn: Callable[..., Any],
        slots: tuple[_Slot, ...],
        leaves: tuple[_Leaves, ...],
        constants: Mapping[_Slot, Any],
    ) -> None:
        self._fn, self._slots, self._leaves, self._constants = fn, slots, leaves, dict(constants)
        functools.update_wrapper(self, fn)
        self.__name__ = name_of(fn)
        kind = inspect.Parameter
        named = [kind(slot.name, kind.POSITIONAL_OR_KEYWORD) for slot in slots if not isinstance(slot.within, int)]
        rest = [kind(slot.parameter, kind.VAR_POSITIONAL) for slot in slots if isinstance(slot.within, int)][:1]
        self.__signature__ = inspect.Signature([*named, *rest])

    def __call__(self, *arrays: Any) -> Any:
        given = dict(self._constants)
        for slot, leaves, each in zip(self._slots, self._leaves, arrays, strict=True):
            given[slot] = leaves.whole(each)
        signature = inspect.signature(self._fn)
        bound = inspect.BoundArguments(signature, {})  # pyright: ignore[reportArgumentType]
        for parameter in signature.parameters.values():
            values = {slot.within: value for slot, value in given.items() if slot.parameter == parameter.name}
            if not values:
                continue  # an omitted default, or an empty `*rest`, which must not hide it
            if parameter.kind is parameter.VAR_POSITIONAL:
                bound.arguments[parameter.name] = tuple(
                    values[at] for at in sorted(values, key=lambda at: int(at or 0))
                )
            elif parameter.kind is parameter.VAR_KEYWORD:
                bound.arguments[parameter.name] = values
            else:
                bound.arguments[parameter.name] = values[None]
        return self._fn(*bound.args, **bound.kwargs)


def name_of(fn: Callable[..., Any]) -> str:
    """The name of a function, of the one inside a `functools.partial`, or of a class of callables."""
    return getattr(fn, "__name__", None) or getattr(getattr(fn, "func", None), "__name__", None) or type(fn).__name__


@dataclass(frozen=True)
class Calls:
    """The reader of the calls of one function.

    **Raises:** when made, `AutoshardError` for names and positions that the function does not have.
    """

    fn: Callable[..., Any]
    static_argnums: int | Sequence[int] = ()
    static_argnames: str | Sequence[str] = ()
    donate_argnums: int | Sequence[int] = ()
    donate_argnames: str | Sequence[str] = ()
    _static: frozenset[Any] = field(init=False)
    _donated: frozenset[Any] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_static", self._chosen("static", self.static_argnums, self.static_argnames))
        object.__setattr__(self, "_donated", self._chosen("donate", self.donate_argnums, self.donate_argnames))

    def of(self, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> Call:
        """A call with these arguments.

        **Raises:** `TypeError` if the function does not take them, or for a static argument without a hash.
        """
        slots = list(_slots(inspect.signature(self.fn), args, keywords))
        slots.sort(key=lambda pair: isinstance(pair[0].within, int))  # *rest last
        constants = {slot: value for slot, value in slots if self._is(slot, self._static)}
        arrays = [(slot, *_parted(value)) for slot, value in slots if slot not in constants]
        found = tuple((slot, leaves) for slot, _, leaves in arrays)
        values: list[Any] = [value for _, value, _ in arrays]
        donated = tuple(i for i, (slot, _) in enumerate(found) if self._is(slot, self._donated))
        key: tuple[Any, ...] = (
            tuple((slot, type(value), _hashable(slot, value)) for slot, value in constants.items()),
            tuple((slot, leaves.structure if leaves.static else None, leaves.static) for slot, leaves in found),
        )
        at = tuple(i for i, value in enumerate(values) if has_modules(value))
        modules = Modules.of([values[i] for i in at]) if at else None
        if modules is not None:
            key += (modules.graph,)
            for i, state in zip(at, modules.states, strict=True):
                values[i] = state
        return Call(tuple(values), key, donated, self.fn, found, constants, modules, at)

    def _is(self, slot: _Slot, chosen: frozenset[Any]) -> bool:
        within = slot.within
        return (
            slot.parameter in chosen
            or (slot.parameter, within) in chosen
            or (isinstance(within, str) and within in chosen)
        )

    def _chosen(self, what: str, positions: int | Sequence[int], names: str | Sequence[str]) -> frozenset[Any]:
        """The parameters of these positions and names; a position in `*rest` is a pair of name and index."""
        parameters = list(inspect.signature(self.fn).parameters.values())
        flat = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
        rest = next((each.name for each in parameters if each.kind is each.VAR_POSITIONAL), None)
        more = any(each.kind is each.VAR_KEYWORD for each in parameters)
        found: set[Any] = set()
        for at in (positions,) if isinstance(positions, int) else positions:
            if -len(flat) <= at < len(flat):
                found.add(flat[at].name)
            elif rest is not None and at >= 0:
                found.add((rest, at - len(flat)))
            else:
                raise AutoshardError(
                    f"{what}_argnums={positions} is out of range for {name_of(self.fn)}, which has {len(flat)} positional"
                    f" arguments (expected 0 to {len(flat) - 1})."
                )
        for name in (names,) if isinstance(names, str) else names:
            if not more and name not in [each.name for each in parameters]:
                given = ", ".join(each.name for each in parameters)
                raise AutoshardError(f"{what}_argnames: {name_of(self.fn)} has no parameter {name}; it has {given}.")
            found.add(name)
        return frozenset(found)


def _slots(signature: inspect.Signature, args: Any, keywords: Any) -> Iterable[tuple[_Slot, Any]]:
    for name, value in signature.bind(*args, **keywords).arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            yield from ((_Slot(name, at), each) for at, each in enumerate(value))
        elif kind is inspect.Parameter.VAR_KEYWORD:
            yield from ((_Slot(name, key), value[key]) for key in sorted(value))
        else:
            yield _Slot(name), value


def _hashable(slot: _Slot, value: Any) -> Any:
    try:
        hash(value)
    except TypeError as error:
        raise TypeError(f"The static argument {slot.name} must be hashable, got {type(value).__name__}.") from error
    return value


def _parted(value: Any) -> tuple[Any, _Leaves]:
    """An argument without its static leaves, and its structure with them."""
    if isinstance(value, jax.Array | jax.ShapeDtypeStruct | np.ndarray | int | float | complex) or has_modules(value):
        return value, _Leaves(None)
    leaves, structure = jax.tree_util.tree_flatten(value)
    static = tuple((at, leaf) for at, leaf in enumerate(leaves) if _is_static(leaf))
    if not static:
        return value, _Leaves(None)
    for at, _ in static:
        leaves[at] = None
    return structure.unflatten(leaves), _Leaves(structure, static)


def _is_static(leaf: Any) -> bool:
    """Whether a leaf is a constant: text, a class, or a function, also one that JAX has wrapped."""
    if isinstance(leaf, _STATIC_LEAVES):
        return not isinstance(leaf, functools.partial) or not jax.tree_util.tree_leaves((leaf.args, leaf.keywords))
    return callable(leaf) and type(leaf).__module__.split(".")[0] in ("jax", "jaxlib")
