"""The user's names for dimensions: by argument path, by size, or from `jax.export.symbolic_shape`.

Names are given as a mapping, with two kinds of entries:

- An argument's path, its dotted form or the end of either, maps to one word per dimension. `_` leaves a dimension without
  a name, a number stays a number, and an expression such as `2*F` is a size too.
- A name maps to a size. It names every dimension of that size in the arguments that has no other name.

```python
dims = {"tokens": "B", "params['embedding']": "V E", "layers.wi_gate": "N E F", "layers.*.wq": "E H D"}
dims = {"B": 64, "E": 18432, "F": 73728}
```

Dimensions without a name are named after the first argument that has them: `wi_gate_2` is the last one of `wi_gate`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import jax

from autoshard._util.paths import dotted, matches_end
from autoshard.errors import OptionError
from costmodels.dimensions import DimensionError, Dimensions, Given, dimensions_of
from costmodels.machine.topology import AXIS_NAMES
from costmodels.program.program import Program
from costmodels.symbols import Expr, dimension, evaluate, parse_expression

Names = Mapping[str, str | int]
Shape = Sequence[Any]

_RESERVED = tuple(name.upper() for name in AXIS_NAMES)


def name_dimensions(
    program: Program,
    values: Sequence[int],
    paths: Sequence[str],
    names: Names | None = None,
    shapes: Sequence[Shape] | None = None,
) -> Dimensions:
    """The dimensions of a traced program by name.

    **Arguments:**

    - `values`, `paths`: the flat arguments' values and paths.
    - `names`: the user's names, as above.
    - `shapes`: the arguments' shapes as the user gave them, with the dimensions of `jax.export.symbolic_shape`, if any.

    **Raises:** `OptionError` for names that match no argument, and for one name with two sizes.
    """
    concrete = [program.values[value].shape for value in values]
    written = [list(row) for row in _given_words(paths, concrete, names or {})]
    for row, shape in zip(written, shapes or (), strict=False):
        row[:] = [str(n) if jax.export.is_symbolic_dim(n) else word for word, n in zip(row, shape, strict=True)]
    try:
        given = [
            Given(value, at, _parse_size(word))
            for value, at, word in _words_by_dimension(values, written)
            if word not in ("", "_")
        ]
        return dimensions_of(program, given, list(_automatic(values, paths, concrete, given)))
    except (DimensionError, ValueError) as error:
        raise OptionError(f"Invalid dimension names: {error}.") from error


def _words_by_dimension(values: Sequence[int], rows: Sequence[Sequence[str]]) -> Iterator[tuple[int, int, str]]:
    for value, row in zip(values, rows, strict=True):
        yield from ((value, at, word) for at, word in enumerate(row))


def _parse_size(word: str) -> Expr:
    size = parse_expression(word)
    taken = sorted(str(symbol) for symbol in size.free_symbols if str(symbol) in _RESERVED)
    if taken:
        raise ValueError(f"{', '.join(_RESERVED)} are reserved for the sizes of mesh axes; rename {taken[0]}")
    return size


def _given_words(paths: Sequence[str], shapes: Sequence[Shape], names: Names) -> Iterator[list[str]]:
    """A word per dimension of every argument: the user's name for it, or an empty string."""
    by_path = {key: words for key, words in names.items() if isinstance(words, str)}
    by_size = {size: key for key, size in names.items() if not isinstance(size, str)}
    if len(by_size) < len(names) - len(by_path):
        raise OptionError("Two names have the same size; name those dimensions by their arguments' paths.")
    unused = dict.fromkeys([*by_path, *by_size.values()])
    for path, shape in zip(paths, shapes, strict=True):
        key = next((key for key in by_path if matches_end(key, path)), None)
        words = _words(path, shape, by_path[key]) if key is not None else [""] * len(shape)
        row = [by_size.get(n, "") if word == "" else word for word, n in zip(words, shape, strict=True)]
        unused = {name: None for name in unused if name != key and name not in row}
        yield row
    if unused:
        key = next(iter(unused))
        if key in by_path:
            near = get_close_matches(key, [*paths, *map(dotted, paths)], n=1, cutoff=0.3)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise OptionError(f"No argument has the path {key!r}.{hint} The paths are {', '.join(paths[:8])}.")
        raise OptionError(f"No argument has a dimension of size {names[key]}, given for the name {key!r}.")


def _words(path: str, shape: Shape, text: str) -> list[str]:
    words = text.replace(",", " ").split()
    if len(words) != len(shape):
        written = ",".join(map(str, shape))
        raise OptionError(
            f"{path} has shape [{written}], but {text!r} names {len(words)} dimensions; give one word each, _ for no name."
        )
    return words


def _automatic(
    values: Sequence[int], paths: Sequence[str], shapes: Sequence[Shape], given: Sequence[Given]
) -> Iterator[Given]:
    """A name for every dimension, made from its argument's path."""
    taken = {str(symbol) for each in given for symbol in each.size.free_symbols} | set(_RESERVED)
    for value, path, shape in zip(values, paths, shapes, strict=True):
        words = [word if word.isidentifier() else f"_{word}" for word in map(_identifier, dotted(path).split("."))]
        for at in range(len(shape)):
            candidates = (f"{'_'.join(words[-count:])}_{at}" for count in range(1, len(words) + 1))
            name = next((name for name in candidates if name not in taken), f"{'_'.join(words)}_{value}_{at}")
            taken.add(name)
            yield Given(value, at, dimension(name))


def _identifier(word: str) -> str:
    return re.sub(r"\W", "_", word)


# --- Symbolic dimensions


def symbols_of(args: Any) -> tuple[str, ...]:
    """The names of the dimensions of `jax.export.symbolic_shape` in the arguments' shapes, in order."""
    shapes = [getattr(leaf, "shape", ()) for leaf in jax.tree_util.tree_leaves(args)]
    dims = [n for shape in shapes for n in shape if jax.export.is_symbolic_dim(n)]
    return tuple(dict.fromkeys(name for n in dims for name in sorted(map(str, parse_expression(str(n)).free_symbols))))


def with_numbers(args: Any, sizes: Mapping[str, int]) -> tuple[Any, ...]:
    """The arguments with numbers for symbolic dimensions: the given sizes, and distinct primes for the others.

    **Raises:** `OptionError` for a size whose name is not a symbolic dimension.
    """
    names = symbols_of(args)
    unknown = sorted(set(sizes) - set(names))
    if unknown:
        raise OptionError(
            f"No argument has a symbolic dimension {unknown[0]}; the symbolic dimensions are {', '.join(names) or 'none'}."
        )
    numbers = {**dict(zip(names, primes(), strict=False)), **sizes}

    def substitute(leaf: Any) -> Any:
        shape = getattr(leaf, "shape", ())
        if not any(jax.export.is_symbolic_dim(n) for n in shape):
            return leaf
        found = tuple(int(evaluate(parse_expression(str(n)), numbers)) for n in shape)
        return jax.ShapeDtypeStruct(found, leaf.dtype)

    return tuple(jax.tree_util.tree_map(substitute, tuple(args)))


def primes() -> Iterator[int]:
    """Primes from 11 on: sizes that a layer is unlikely to have by chance."""
    found, n = [2, 3, 5, 7], 11
    while True:
        if all(n % prime for prime in found):
            found.append(n)
            yield n
        n += 2
