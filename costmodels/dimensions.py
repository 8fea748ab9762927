"""Names for the sizes of a program: equal dimensions, followed through its factors.

The same factor is the same dimension: `[b,i,k],[b,k,j] -> [b,i,j]` makes the last dimension of its first operand and the
middle one of its second one dimension, and so on through the program. Dimensions that are cut or joined (a reshape, a
concatenation) are products and sums of others. Names enter with the arguments. Every factor, every dimension of every array
and every trip count becomes an expression in them; a size that depends on no argument stays a number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from heapq import heappop, heappush
from itertools import combinations
from math import prod
from typing import NamedTuple

from costmodels.machine.lazy_sympy import sympy
from costmodels.program.program import Operation, Program
from costmodels.symbols import Expr, dimension, evaluate, parse_expression, text


class DimensionError(ValueError):
    """Raised for names or sizes of dimensions that contradict each other or the program."""


@dataclass(frozen=True)
class Dimensions:
    """The sizes of a program as expressions in named dimensions, written as text such as `2*F`.

    - `factors`: per operation its factors; `shapes`: per value its dimensions; `counts`: per region its runs.
    - `sizes`: name to number.
    - `relations`: pairs of expressions that are equal in the program, such as `("H*D", "E")`.
    """

    factors: tuple[tuple[str, ...], ...]
    shapes: tuple[tuple[str, ...], ...]
    counts: tuple[str, ...]
    sizes: Mapping[str, int]
    relations: tuple[tuple[str, str], ...] = ()

    def factor(self, operation: int, factor: int) -> Expr:
        """The size of one factor of an operation."""
        return parse_expression(self.factors[operation][factor])

    def elements(self, value: int) -> Expr:
        """The number of elements of a value."""
        return sympy.Mul(*map(parse_expression, self.shapes[value]))

    def runs(self, program: Program, region: int) -> Expr:
        """The number of runs of a region in one step of the program."""
        count = sympy.Integer(1)
        for around in program.enclosing(region):
            count *= parse_expression(self.counts[around])
        return count

    @cached_property
    def symbols(self) -> tuple[sympy.Symbol, ...]:
        """The symbols of all names."""
        return tuple(map(dimension, self.sizes))


class Given(NamedTuple):
    """The expression of a dimension of an argument: its value and its position."""

    value: int
    at: int
    size: Expr


def dimensions_of(program: Program, given: Sequence[Given], automatic: Sequence[Given] = ()) -> Dimensions:
    """Follows names from the arguments through the program.

    **Arguments:**

    - `given`: dimensions with the user's names.
    - `automatic`: names for dimensions that are not yet expressions of those, used in order where needed.

    **Raises:** `DimensionError` if a name stands for two numbers, or for none.
    """
    sizes = _sizes(program, given)
    flow = _Flow(program, sizes)
    for each in given:
        flow.settle(flow.value(each.value, each.at), each.size)
    flow.propagate()
    for each in automatic:
        node = flow.value(each.value, each.at)
        if flow.unknown(node) and program.values[each.value].shape[each.at] > 1:
            sizes[str(each.size)] = program.values[each.value].shape[each.at]
            flow.settle(node, each.size)
            flow.propagate()
    flow.finish()
    return flow.found()


def _sizes(program: Program, given: Sequence[Given]) -> dict[str, int]:
    """Name to number: from dimensions that are a single name, then from those with one name unknown."""
    sizes: dict[str, int] = {}
    waiting = [(each, program.values[each.value].shape[each.at]) for each in given]
    while waiting:
        left = []
        for each, number in waiting:
            free = sorted(each.size.free_symbols - {dimension(name) for name in sizes}, key=str)
            solved = sympy.solve(each.size.subs(sizes) - number, free[0]) if len(free) == 1 else None
            if not free:
                if evaluate(each.size, sizes) != number:
                    known = ", ".join(f"{symbol} = {sizes[str(symbol)]}" for symbol in each.size.free_symbols)
                    raise DimensionError(
                        f"dimension {each.at} of {program.values[each.value].name} is {number}, but {text(each.size)} is"
                        f" {evaluate(each.size, sizes):g} ({known or 'a number'}); one name stands for one number"
                    )
            elif solved and solved[0].is_Integer and solved[0] > 0:
                sizes[str(free[0])] = int(solved[0])
            else:
                left.append((each, number))
        if len(left) == len(waiting):
            each, number = left[0]
            raise DimensionError(
                f"dimension {each.at} of {program.values[each.value].name} is {number}, but {text(each.size)} has"
                " several unknown names; name a dimension by each of them alone"
            )
        waiting = left
    return sizes


# --- The flow


class _Sum(NamedTuple):
    """`whole` is the sum of `parts`, or their product, plus `offset`."""

    whole: int
    parts: tuple[int, ...]
    product: bool
    offset: int = 0


class _Flow:
    """Classes of equal dimensions, their known expressions, and the products and sums between them."""

    def __init__(self, program: Program, sizes: dict[str, int]) -> None:
        self.program, self.sizes = program, sizes
        self.numbers: list[int] = []
        self.values = self._number(value.shape for value in program.values)
        self.factors = self._number([factor.size for factor in op.factors] for op in program.operations)
        self.regions = self._number([[int(region.count) for region in program.regions]])
        self.parent = list(range(len(self.numbers)))
        self.known: dict[int, Expr] = {}
        self.relations: dict[tuple[str, str], None] = {}
        self.rules: list[_Sum] = []
        self.open: dict[int, _Sum] = {}
        self.stirred: set[int] = set()
        self.about: dict[int, list[int]] = {}
        for i, op in enumerate(program.operations):
            self._join(i, op)
        self.open = dict(enumerate(self.rules))
        self.stirred = set(self.open)
        for at, rule in self.open.items():
            for root in {self.root(node) for node in (rule.whole, *rule.parts)}:
                self.about.setdefault(root, []).append(at)

    def _number(self, rows: Iterable[Sequence[int]]) -> list[int]:
        starts = []
        for row in rows:
            starts.append(len(self.numbers))
            self.numbers += row
        return starts

    def value(self, value: int, at: int) -> int:
        return self.values[value] + at

    def root(self, node: int) -> int:
        while self.parent[node] != node:
            self.parent[node] = self.parent[self.parent[node]]
            node = self.parent[node]
        return node

    def unknown(self, node: int) -> bool:
        return self.root(node) not in self.known

    def of(self, node: int) -> Expr:
        return self.known[self.root(node)]

    def _join(self, i: int, op: Operation) -> None:
        """Adds one operation: equal factors are equal dimensions; a compound dimension is a product."""
        for use in (*op.inputs, *op.outputs):
            for at, dim in enumerate(use.dims):
                node, parts = self.value(use.value, at), tuple(self.factors[i] + factor for factor in dim)
                if len(parts) == 1 and self.numbers[node] == self.numbers[parts[0]]:
                    self._union(node, parts[0])
                elif len(parts) > 1:
                    self.rules.append(_Sum(node, parts, product=True))
                    if op.factors[dim[0]].kind == "exchanged":  # the number of parts is a constant of the program
                        self.settle(parts[1], sympy.Integer(self.numbers[parts[1]]))
        self.rules += [
            _Sum(self.factors[i] + whole, tuple(self.factors[i] + part for part in parts), False, offset)
            for whole, parts, offset in _sums(op)
        ]
        for factor, region in _trips(op):
            self._union(self.factors[i] + factor, self.regions[0] + region)

    def _union(self, a: int, b: int) -> None:
        a, b = self.root(a), self.root(b)
        if a != b and self.numbers[a] == self.numbers[b]:
            self.parent[max(a, b)] = min(a, b)

    def settle(self, node: int, size: Expr) -> None:
        """Sets the expression of a class; if it has one already, records a relation."""
        root = self.root(node)
        if root not in self.known:
            self.known[root] = size
            self.stirred.update(at for at in self.about.get(root, ()) if at in self.open)
        elif self.known[root] != size and sympy.expand(self.known[root] - size) != 0:
            self.relations[str(self.known[root]), str(size)] = None

    def propagate(self) -> None:
        """Derives unknown classes from products and sums, until nothing changes.

        Each round visits, in order, the rules whose classes have changed.
        """
        while self.stirred:
            ahead, asked = sorted(self.stirred), self.stirred
            self.stirred = set()
            while ahead:
                at = heappop(ahead)
                asked.discard(at)
                if self._apply(self.open[at]):
                    del self.open[at]
                later = {other for other in self.stirred if other > at}
                self.stirred -= later | {at}
                for other in later - asked:
                    heappush(ahead, other)
                asked |= later

    def _apply(self, rule: _Sum) -> bool:
        """Applies a rule; returns whether it is exhausted."""
        open_parts = {self.root(part) for part in rule.parts if self.unknown(part)}
        if not open_parts:
            self.settle(rule.whole, self._combine(rule, rule.parts))
            return True
        if self.unknown(rule.whole):
            return False
        rest = self._rest(rule)
        if len(open_parts) == 1:
            (root,) = open_parts
            times = sum(self.root(part) == root for part in rule.parts)
            if not rule.product:
                self.settle(root, rest / times)
            elif times == 1:
                self.settle(root, rest)
            return not self.unknown(root)
        return rule.product and self._match_names(open_parts, rest)

    def _combine(self, rule: _Sum, parts: Iterable[int]) -> Expr:
        sizes = [self.of(part) for part in parts]
        return sympy.Mul(*sizes) if rule.product else sympy.Add(*sizes, rule.offset)

    def _rest(self, rule: _Sum) -> Expr:
        """The rest of the whole for the unknown parts."""
        settled = self._combine(rule, [part for part in rule.parts if not self.unknown(part)])
        return self.of(rule.whole) / settled if rule.product else sympy.expand(self.of(rule.whole) - settled)

    def _match_names(self, parts: set[int], rest: Expr) -> bool:
        """Sets each part to the product of names that has its size, if every part has exactly one."""
        names = [symbol for symbol in rest.as_ordered_factors() if symbol.is_Symbol]
        if sympy.Mul(*names) != rest or len(names) > 6:
            return False
        choices = {
            part: [
                some
                for count in range(1, len(names) + 1)
                for some in combinations(names, count)
                if prod(self.sizes[str(symbol)] for symbol in some) == self.numbers[part]
            ]
            for part in parts
        }
        used = [symbol for some in choices.values() for each in some for symbol in each]
        if any(len(some) != 1 for some in choices.values()) or len(set(used)) != len(used):
            return False
        for part, some in choices.items():
            self.settle(part, sympy.Mul(*some[0]))
        return True

    def finish(self) -> None:
        """Completes the rest: all parts of a cut dimension except the last are constants, and so are all other unknowns."""
        while self.open:
            rule = next((rule for rule in self.open.values() if not self.unknown(rule.whole)), None)
            if rule is None:
                break
            first = next(part for part in rule.parts if self.unknown(part))
            alike = not rule.product and len({self.numbers[part] for part in rule.parts if self.unknown(part)}) == 1
            count = sum(self.unknown(part) for part in rule.parts)
            self.settle(first, self._rest(rule) / count if alike else sympy.Integer(self.numbers[first]))
            self.propagate()
        wholes = {self.root(rule.whole) for rule in self.open.values()}
        for left in (False, True):
            for node in range(len(self.numbers)):
                root = self.root(node)
                if root not in self.known and (left or root not in wholes):
                    self.settle(root, sympy.Integer(self.numbers[root]))
            self.propagate()

    def found(self) -> Dimensions:
        written: dict[Expr, str] = {}

        def rows(starts: Sequence[int], lengths: Iterable[int]) -> Iterator[tuple[str, ...]]:
            for start, length in zip(starts, lengths, strict=True):
                sizes = [self.of(start + at) for at in range(length)]
                yield tuple(written.setdefault(size, str(size)) for size in sizes)

        program = self.program
        return Dimensions(
            tuple(rows(self.factors, (len(op.factors) for op in program.operations))),
            tuple(rows(self.values, (len(value.shape) for value in program.values))),
            next(rows(self.regions, [len(program.regions)])),
            dict(self.sizes),
            tuple(self.relations),
        )


def _sums(op: Operation) -> Iterator[tuple[int, tuple[int, ...], int]]:
    """Factors that are the sum of others: the whole, the parts, and the padding."""
    if op.primitive in ("concatenate", "pad") and op.inputs:
        wholes, sides = op.outputs[0].dims, [use.dims for use in op.inputs if use.dims]
    elif op.primitive == "split":
        wholes, sides = op.inputs[0].dims, [use.dims for use in op.outputs]
    else:
        return
    for at, whole in enumerate(wholes):
        parts = [side[at] for side in sides]
        if len(whole) == 1 and all(len(part) == 1 and part != whole for part in parts):
            sizes = [op.factors[part[0]].size for part in parts]
            yield whole[0], tuple(part[0] for part in parts), op.factors[whole[0]].size - sum(sizes)


def _trips(op: Operation) -> Iterator[tuple[int, int]]:
    """Factors that count a loop's iterations: the leading dimension of its stacked inputs and results."""
    if op.primitive == "loop_slice":
        yield op.inputs[0].dims[0][0], op.outputs[0].region
    elif op.primitive == "loop_stack" and op.inputs:
        yield op.outputs[0].dims[0][0], op.inputs[0].region


# --- Other numbers


def rebound(program: Program, dimensions: Dimensions, sizes: Mapping[str, int]) -> Program:
    """The program with other numbers for its named dimensions, as another trace would give it.

    **Raises:** `DimensionError` for unknown names, for sizes that break a relation of the program, and for sizes that
    make a dimension fractional.
    """
    unknown = sorted(set(sizes) - set(dimensions.sizes))
    if unknown:
        raise DimensionError(
            f"unknown dimension {', '.join(unknown)}; the dimensions are {', '.join(dimensions.sizes)}"
        )
    numbers = {**dimensions.sizes, **sizes}
    for left, right in (map(parse_expression, relation) for relation in dimensions.relations):
        if evaluate(left, numbers) != evaluate(right, numbers):
            raise DimensionError(
                f"{text(left)} and {text(right)} are one dimension of the program, but would be"
                f" {evaluate(left, numbers):g} and {evaluate(right, numbers):g}"
            )
    known = {name: size for name, size in numbers.items() if size >= 0}  # a size may be a name alone

    def number(size: str) -> int:
        if size not in known:
            known[size] = _exact_integer(size, numbers)
        return known[size]

    values = (
        replace(value, shape=tuple(map(number, shape)))
        for value, shape in zip(program.values, dimensions.shapes, strict=True)
    )
    operations = (
        replace(op, factors=tuple(replace(f, size=number(n)) for f, n in zip(op.factors, sizes_of, strict=True)))
        for op, sizes_of in zip(program.operations, dimensions.factors, strict=True)
    )
    regions = (replace(r, count=number(n)) for r, n in zip(program.regions, dimensions.counts, strict=True))
    return replace(program, values=tuple(values), operations=tuple(operations), regions=tuple(regions))


def _exact_integer(size: str, numbers: Mapping[str, int]) -> int:
    """The size as a whole number, exactly."""
    if size.isdecimal():
        return int(size)
    names = {str(symbol) for symbol in parse_expression(size).free_symbols}
    found = parse_expression(size).xreplace({dimension(name): sympy.Integer(numbers[name]) for name in names})
    if not found.is_Integer or found < 0:
        asked = ", ".join(
            f"{symbol} = {numbers[str(symbol)]}" for symbol in sorted(parse_expression(size).free_symbols, key=str)
        )
        raise DimensionError(
            f"{text(parse_expression(size))} must be a whole number of 0 or more, got {found} with {asked}"
        )
    return int(found)
