"""The weights of a program by dataflow: which operand of a matmul is made of parameters alone.

An array is *made of parameters* if arithmetic, views, lookups by constants and products of parameters lead to it from
arguments other than data: `int8 * scale`, group scales, a masked, normalised or fake-quantised weight, a LoRA sum, a
tied embedding. An array that depends on data is an *activation*. Data are the arguments that meet a weight on the other
side of a matmul, and the indices of a lookup.

Where both operands of a matmul could be a weight, the one of fewer top-level arguments is (`norm(x, params) @ w`), then
the one whose arguments have fewer uses (an input feeds several matmuls), then the second, as in `x @ w`.

Names of models and parameters are not used. Arguments belong together by the top-level argument that holds them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Literal

from costmodels.program.analysis import cached_analysis
from costmodels.program.grouped import grouped
from costmodels.program.program import Operation, Program, Use

_ACTIVATION = -1
"""In place of the set of arguments (a bit mask) that an array is made of: the array depends on data."""
Place = tuple[int, int]
"""A value and one of its dimensions."""


@cached_analysis
def weight_operand(program: Program, i: int) -> int | None:
    """The operand of a matmul that is a weight; `None` if both are activations or both are made of parameters.

    A weight is made of parameters alone and shares no batch with the other operand; a cache does.
    """
    return origins_of(program).weight(i)


def weight_sources(program: Program, value: int) -> tuple[int, ...]:
    """The source operations of the arguments that a value is made of, the largest first; empty for an activation."""
    return origins_of(program).sources(value)


def weight_name(program: Program, value: int) -> str:
    """The path of the largest argument that a value is made of, or the value's own name."""
    sources = weight_sources(program, value)
    return program.source_name(program.operations[sources[0]].outputs[0].value if sources else value)


@cached_analysis
def origins_of(program: Program) -> Origins:
    """The origins of all arrays and dimensions of a program."""
    return Origins(program)


def is_product(op: Operation) -> bool:
    """Whether an operation multiplies two arrays on the matrix unit."""
    return op.op_class == "matmul" and len(op.inputs) == 2


def factors_of(dims: Iterable[Iterable[int]]) -> list[int]:
    """The factors of some dimensions."""
    return [factor for dim in dims for factor in dim]


def places_of(use: Use, factor: int) -> list[Place]:
    """The dimensions of a use that have a factor."""
    return [(use.value, at) for at, dim in enumerate(use.dims) if factor in dim]


class Origins:
    """The arguments that each array is made of, and the origins of dimensions.

    Sets of arguments are bit masks. Loops lead back, so operations are judged until nothing changes.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self._sources = (*program.arguments, *program.constants)
        self._bits = {at: 1 << k for k, at in enumerate(self._sources) if not _is_key(program, at)}
        self._data = 0
        self._made: list[int] = []
        self._weights: dict[int, int | None] = {}
        settled = -1
        while settled != self._data:
            settled = self._data
            self._find_made()
            for i, op in program.matmuls():
                self._judge_product(i, op)

    def weight(self, i: int) -> int | None:
        """The operand of a matmul that is a weight."""
        return self._weights.get(i)

    def sources(self, value: int) -> tuple[int, ...]:
        """The source operations of the arguments that a value is made of, the largest first; empty for an activation."""
        return tuple(sorted(self._members(self._made[value]), key=lambda at: -self._bytes(at)))

    def _members(self, made: int) -> Iterator[int]:
        """The source operations of a set of arguments; none of an activation's."""
        while made > 0:
            last = made & -made
            yield self._sources[last.bit_length() - 1]
            made -= last

    def _bytes(self, source: int) -> float:
        return self.program.values[self.program.operations[source].outputs[0].value].bytes

    # --- what arrays are made of

    def _find_made(self) -> None:
        """The arguments that each array is made of, with the data known so far."""
        self._made = [0] * len(self.program.values)
        changed = True
        while changed:
            changed = False
            for i, op in enumerate(self.program.operations):
                made = self._made_by(i, op)
                for use in op.outputs:
                    changed = changed or made != self._made[use.value]
                    self._made[use.value] = made

    def _made_by(self, i: int, op: Operation) -> int:
        """The arguments that the results of an operation are made of."""
        if op.op_class == "source":
            own = self._bits.get(i, 0)
            return _ACTIVATION if own & self._data else own
        operands = op.inputs[:1] if op.primitive == "dynamic_slice" else op.inputs  # the rest says where, not what
        made = [self._made[use.value] for use in operands]
        if op.primitive == "gather" and made[-1]:
            self._data |= max(made[-1], 0)
            return _ACTIVATION
        if op.op_class == "matmul" and not self._are_parameters(*made[:2]):
            return _ACTIVATION
        return _together(made)

    def _are_parameters(self, *made: int) -> bool:
        """Whether operands are made of one top-level argument, while another one holds arrays, too."""
        if min(made) < 0:
            return False
        groups = self._groups(_together(made))
        return len(groups) < 2 and bool(self._array_groups - groups)

    # --- the operands of matmuls

    def _judge_product(self, i: int, op: Operation) -> None:
        """Finds the weight of a matmul; the arguments beside it are data."""
        if i not in self._weights or self._is_overtaken(i, op):
            self._weights[i] = self._find_weight(i, op)
        weight = self._weights[i]
        if weight is None:
            return
        beside = 1 - weight if is_product(op) else 0
        mine, other = (self._made[op.inputs[side].value] for side in (weight, beside))
        beyond = self._groups(other) - self._groups(mine)
        if other > 0:
            self._data |= self._within(other, beyond) if beyond else other & ~mine

    def _is_overtaken(self, i: int, op: Operation) -> bool:
        """Whether the operand that was the weight is an activation after all."""
        weight = self._weights[i]
        return weight is not None and self._made[op.inputs[weight].value] < 0

    def _find_weight(self, i: int, op: Operation) -> int | None:
        made = [self._made[use.value] for use in op.inputs[:2]]
        if groups := grouped(op):
            operands = [each.operand for each in groups.matrices if each.operand is not None]
            return next((k for k in operands if self._made[op.inputs[k].value] > 0), None)
        if len(op.inputs) != 2 or self._are_parameters(*made):
            return None
        found = [k for k in (1, 0) if self._is_weight(i, k)]
        first, second = self._groups(made[0]), self._groups(made[1])
        if len(found) == 2 and (first < second or second < first):
            return int(second < first)
        return min(found, key=lambda k: self._likeness_to_data(i, k), default=None)

    def _likeness_to_data(self, i: int, k: int) -> tuple[int, int, bool]:
        """Less for a weight than for an input.

        An input feeds several operations, a weight one. Parameters come in trees of several arrays. An input may have
        passed through arithmetic.
        """
        value = self.program.operations[i].inputs[k].value
        sources = self.sources(value)
        arguments = (self.program.operations[at].outputs[0].value for at in sources)
        uses = max((self.program.reads.get(argument, 0) for argument in arguments), default=0)
        beside = max((self._group_sizes[self._group_of[at]] for at in sources), default=0)
        return uses, -beside, self.program.values[value].origin is None

    def _is_weight(self, i: int, k: int) -> bool:
        op = self.program.operations[i]
        if self._made[op.inputs[k].value] <= 0:
            return False
        if op.primitive == "conv_general_dilated":  # the factors that it shares with the image are feature groups
            return k == 1
        mine, others = (set(factors_of(op.inputs[side].dims)) for side in (k, 1 - k))
        shared = [f for f in mine & others if op.factors[f].kind != "sum"]
        # Experts are shared too, but they come from a router's weight, or from an iota as in one-hot arrays.
        return all(self._find_origin(places_of(op.inputs[1 - k], f)) in ("weight", "nothing") for f in shared)

    # --- top-level arguments

    @cached_property
    def _group_of(self) -> dict[int, str]:
        """Source operation to the top-level argument that holds it; closed-over arrays are one."""
        arguments = {at: re.split(r"[.\[]", self.program.operations[at].name)[0] for at in self.program.arguments}
        return arguments | dict.fromkeys(self.program.constants, "")

    @cached_property
    def _group_sizes(self) -> Counter[str]:
        return Counter(self._group_of.values())

    def _groups(self, made: int) -> frozenset[str]:
        return frozenset(self._group_of[at] for at in self._members(made))

    def _within(self, made: int, groups: frozenset[str]) -> int:
        """The arguments of a set that belong to some top-level arguments."""
        return sum(self._bits[at] for at in self._members(made) if self._group_of[at] in groups)

    @cached_property
    def _array_groups(self) -> frozenset[str]:
        """The top-level arguments that hold an array of at least one dimension, beside PRNG keys."""
        shapes = {at: self.program.values[self.program.operations[at].outputs[0].value].shape for at in self._bits}
        return frozenset(self._group_of[at] for at, shape in shapes.items() if shape)

    # --- dimensions

    def is_from_weight(self, i: int, factor: int) -> bool:
        """Whether an operand of a matmul gets this factor from a weight, or as a feature that weights contract."""
        places = [place for use in self.program.operations[i].inputs for place in places_of(use, factor)]
        return self._find_origin(places, self._features) == "weight"

    @cached_property
    def _features(self) -> frozenset[Place]:
        """Dimensions of arguments that a matmul by a weight contracts: features, not tokens."""
        contracted: list[Place] = []
        for i, weight in self._weights.items():
            op = self.program.operations[i]
            if weight is not None and not grouped(op):
                own = factors_of(op.inputs[weight].dims)
                summed = [factor for factor in own if op.factors[factor].kind == "sum"]
                contracted += [place for factor in summed for place in places_of(op.inputs[1 - weight], factor)]
        makers = self.program.producers
        return frozenset(
            (value, at)
            for value, at in self._walk(contracted)
            if value in makers and self.program.operations[makers[value][0]].op_class == "source"
        )

    def _walk(self, places: list[Place]) -> Iterator[Place]:
        """Dimensions and those that they come from, up to matmuls by a weight that make them."""
        seen = set(places)
        while places:
            value, at = places.pop()
            yield value, at
            if value not in self.program.producers:
                continue
            i, position = self.program.producers[value]
            op = self.program.operations[i]
            weight = self._weights.get(i) if is_product(op) else None
            for factor in op.outputs[position].dims[at]:
                if weight is not None and places_of(op.inputs[weight], factor):
                    continue
                further = {place for use in op.inputs for place in places_of(use, factor)} - seen
                seen |= further
                places += sorted(further)

    def _find_origin(
        self, places: list[Place], features: frozenset[Place] = frozenset()
    ) -> Literal["weight", "argument", "nothing"]:
        """Follows dimensions to their origins.

        Returns "weight" if one is an output factor of a weight or one of `features`, else "argument" if one comes from an
        argument, else "nothing".
        """
        found = "nothing"
        for value, at in self._walk(list(places)):
            if value not in self.program.producers:
                continue
            i, position = self.program.producers[value]
            op = self.program.operations[i]
            if (value, at) in features:
                return "weight"
            if op.op_class == "source":
                found = "argument"
            weight = self._weights.get(i) if is_product(op) else None
            if weight is not None and any(places_of(op.inputs[weight], f) for f in op.outputs[position].dims[at]):
                return "weight"
        return found


def _together(made: Sequence[int]) -> int:
    """The arguments of an array that arithmetic makes of several."""
    if any(each < 0 for each in made):
        return _ACTIVATION
    total = 0
    for each in made:
        total |= each
    return total


def _is_key(program: Program, source: int) -> bool:
    """Whether a source is an array of PRNG keys, which are neither data nor parameters."""
    return program.values[program.operations[source].outputs[0].value].dtype.startswith("key<")
