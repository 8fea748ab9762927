"""Names of strategies in the terms of the literature, derived from factors and layouts alone.

Every factor of a matmul by a weight is *contracted* (summed over), an *output* factor (the weight's own), or one of the
activation's: its *batch* (the first) and its *sequence* (all others). The family describes the weight:

| family | the weight |
|---|---|
| `WS-1D` | stays in its stored layout, split along contracted or along output factors (Pope et al. 2022, §3.2.1) |
| `WS-2D` | stays in its stored layout, split along both (§3.2.2) |
| `WG-X`, `WG-XY`, ... | is gathered over these axes from its stored layout (§3.2.3) |
| `data parallel` | is replicated; only batch and sequence are split |
| `replicated` | is replicated, and every chip computes the whole matmul |

A contraction of two activations is attention. Its names are: `batch-sharded`, `head-sharded`,
`query-sharded` (positions of the queries), `sequence-sharded` (positions of keys and values), `head-size-sharded`.

Names of models and parameters are not used. Heads and positions are distinguished by the origin of a dimension: heads and
head sizes are output factors of earlier weights, batch and positions are not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, TypeVar

from costmodels.machine.topology import Topology
from costmodels.program.analysis import cached_analysis
from costmodels.program.program import Operation, Program, Use
from search.answer.assignment import Choice, needed, produced
from search.formulation.layouts import Layout

T = TypeVar("T")


def strategy_name(program: Program, topology: Topology, choice: Choice, i: int) -> str:
    """The name of one operation's strategy.

    ```python
    strategy_name(program, topology, choice, i)      # "WS-2D: contracted over x, output over yz"
    ```

    Roles are in the order of this module's tables, axes in the order of the mesh. Axes along which chips repeat the same
    work are last. Operations other than matmuls are described by the dimensions of their first result.

    **Arguments:**

    - `i`: the operation's index in the program.
    """
    order = [axis.name for axis in topology.axes if axis.size > 1]
    roles, family = _roles_and_family(program, choice, i, order)
    strategy = choice.strategies[i]
    split: dict[str, list[str]] = {}
    for role, axes in zip(roles, strategy.splits, strict=True):
        split.setdefault(role, []).extend(axes)
    parts = [f"{role} over {_join_axes(split[role], order)}" for role in sorted(split, key=_place) if split[role]]
    partial = {axis for axes in strategy.carried for axis in axes}
    parts += [f"partial sums over {_join_axes(partial, order)}"] if partial else []
    if not parts and not family.startswith("WG"):
        return "replicated"
    idle = set(order) - set(strategy.axes) - partial
    parts += [f"repeated over {_join_axes(idle, order)}"] if idle else []
    return (f"{family}: " if family else "") + ", ".join(parts)


def _roles_and_family(program: Program, choice: Choice, i: int, order: Sequence[str]) -> tuple[list[str], str]:
    """The role of each factor, and the family of the weight, if there is one."""
    op = program.operations[i]
    if not is_product(op):
        return _expert_roles(op) or (_dimensions(op), "")
    weight = weight_operand(program, i)
    if weight is None:
        return _attention_roles(program, i), ""
    roles = weight_roles(op, weight)
    gathered = _gathered_axes(program, choice, i, weight)
    if gathered:
        return roles, f"WG-{_join_axes(gathered, order).upper()}"
    split = {role for role, axes in zip(roles, choice.strategies[i].splits, strict=True) if axes}
    kinds = len(split & {"contracted", "output"})
    return roles, f"WS-{kinds}D" if kinds else "data parallel"


# Roles in the order in which a name lists them.
_ROLES = (
    "experts",
    "contracted",
    "output",
    "batch",
    "sequence",
    "batch-sharded",
    "head-sharded",
    "query-sharded",
    "sequence-sharded",
    "head-size-sharded",
)


def _place(role: str) -> tuple[int, str]:
    return (_ROLES.index(role) if role in _ROLES else len(_ROLES), role)


def _join_axes(axes: Iterable[str], order: Sequence[str]) -> str:
    return "".join(axis for axis in order if axis in set(axes))


def _expert_roles(op: Operation) -> tuple[list[str], str] | None:
    """The roles in a matmul of groups of rows with one matrix each: the groups are a mixture's experts."""
    if op.primitive != "ragged_dot_general" or op.op_class != "matmul":
        return None
    counted = op.inputs[2].dims[-1][0]
    roles = _dimensions(op)
    roles[counted - 1] = "experts"  # created just before the factor of the counts
    return roles, "mixture of experts"


def _factors(dims: Iterable[Iterable[int]]) -> list[int]:
    return [factor for dim in dims for factor in dim]


def _dimensions(op: Operation) -> list[str]:
    """Each factor as a dimension of the first result, or of the first operand that has it."""
    roles = ["a dimension"] * len(op.factors)
    for use in (*op.inputs[::-1], *op.outputs[::-1]):
        for at, dim in enumerate(use.dims):
            for factor in dim:
                roles[factor] = f"dimension {at}"
    return roles


# --- Matmuls by a weight


@cached_analysis
def weight_operand(program: Program, i: int) -> int | None:
    """The operand of a matmul that is a weight; None if both are activations.

    A weight is an argument (or a view, a cast or a layer of one) that shares no batch with the other operand; a cache
    does. Of two candidates it is the one with fewer uses, or else the second, as in `x @ w`.
    """
    return _Origins(program).weight(i)


def weight_roles(op: Operation, weight: int) -> list[str]:
    """The role of each factor in a matmul by a weight: "contracted", "output", "batch" or "sequence"."""
    own, others = set(_factors(op.inputs[weight].dims)), _factors(op.inputs[1 - weight].dims)
    tokens = [factor for factor in others if factor not in own]
    roles = []
    for factor in range(len(op.factors)):
        if factor in own:
            roles.append("contracted" if op.factors[factor].kind == "sum" else "output")
        else:
            roles.append("batch" if factor in tokens[:1] else "sequence")
    return roles


def _gathered_axes(program: Program, choice: Choice, i: int, weight: int) -> set[str]:
    """The axes that split a weight in its stored layout but not in its use."""
    value = program.operations[i].inputs[weight].value
    return set(stored_layout(program, choice, value).axes) - set(needed(program, choice, i, weight).axes)


def stored_layout(program: Program, choice: Choice, value: int) -> Layout:
    """The layout of the argument that a value is a view, a cast or a layer of."""
    origin = program.values[value].origin
    for source in (*program.arguments, *program.constants):
        argument = program.operations[source].outputs[0].value
        if program.values[argument].origin == origin:
            return produced(program, choice, argument)
    return produced(program, choice, value)


@cached_analysis
def product_roles(program: Program, i: int) -> tuple[str, int, list[str]]:
    """The kind of a matmul, its weight operand, and the roles of its factors.

    "weight": a matmul by a weight, with the roles of `weight_roles`, and "experts" for factors that both operands have.
    "gradient": a weight's gradient, whose dimensions all come from weights. "attention": of two other activations.
    """
    op = program.operations[i]
    if op.primitive == "ragged_dot_general":
        return _ragged_roles(op)
    origins = _Origins(program)
    weight = origins.weight(i)
    if weight is not None:
        shared = set.intersection(*(set(_factors(use.dims)) for use in op.inputs))
        roles = weight_roles(op, weight)
        if op.primitive != "conv_general_dilated":
            roles = ["experts" if f in shared and role == "output" else role for f, role in enumerate(roles)]
        return "weight", weight, roles
    left = _factors(op.outputs[0].dims)
    if left and all(origins.is_from_weight(i, factor) for factor in left):
        return "gradient", -1, []
    return "attention", -1, _attention_roles(program, i)


def _ragged_roles(op: Operation) -> tuple[str, int, list[str]]:
    """As `product_roles`, for a matmul over ragged groups: by a weight per expert, or the gradient of such weights."""
    counted = op.inputs[2].dims[-1][0]
    experts = counted - 1  # created just before the factor of the counts
    rows, matrices = (set(_factors(op.inputs[side].dims)) for side in (0, 1))
    if experts not in matrices:
        return "gradient", -1, []
    roles = ["batch" if f in rows - matrices else "output" for f in range(len(op.factors))]
    roles = ["contracted" if f in rows & matrices and op.factors[f].kind == "sum" else r for f, r in enumerate(roles)]
    roles[experts] = "experts"
    return "weight", 1, roles


# --- Contractions of two activations


@cached_analysis
def _attention_roles(program: Program, i: int) -> list[str]:
    """Heads come from weights, positions do not. A factor of both operands that comes from no weight is the batch."""
    op, origins = program.operations[i], _Origins(program)
    left, right = (set(_factors(use.dims)) for use in op.inputs)
    roles = []
    for factor in range(len(op.factors)):
        given = origins.is_from_weight(i, factor)
        if op.factors[factor].kind == "sum" or factor not in left:
            roles.append("head-size-sharded" if given else "sequence-sharded")
        elif given:
            roles.append("head-sharded")
        else:
            roles.append("batch-sharded" if factor in right else "query-sharded")
    return roles


@cached_analysis
def _known_weights(program: Program) -> dict[int, int | None]:
    """The weight operands that are classified already, by matmul."""
    return {}


class _Origins:
    """The origins of dimensions: whether a dimension is an output factor of a weight, here or earlier."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._known: dict[int, int | None] = _known_weights(program)
        self._assumed: dict[int, int | None] = {}

    def weight(self, i: int) -> int | None:
        """The operand of a matmul that is a weight. A matmul that is already being classified (in a loop) has none.

        Each of a hundred matmuls leads to all before it, so intermediate results are kept until a classification ends.
        """
        if i in self._known:
            return self._known[i]
        if i in self._assumed:
            return self._assumed[i]
        outermost = not self._assumed
        self._assumed[i] = None
        found = [k for k in (1, 0) if self._is_weight(i, k)]
        weight = self._assumed[i] = min(found, key=lambda k: self._uses(i, k), default=None)
        if outermost:
            self._known[i] = weight
            self._assumed.clear()
        return weight

    def _uses(self, i: int, k: int) -> int:
        """The number of operations that use the argument of which an operand is a view: inputs have several, weights one."""
        return self.program.reads.get(self.program.values[self.program.operations[i].inputs[k].value].origin, 0)

    def _is_weight(self, i: int, k: int) -> bool:
        op = self.program.operations[i]
        if not self.program.values[op.inputs[k].value].origin:
            return False
        if op.primitive == "conv_general_dilated":  # the factors that it shares with the image are feature groups
            return k == 1
        mine, others = (set(_factors(op.inputs[side].dims)) for side in (k, 1 - k))
        shared = [f for f in mine & others if op.factors[f].kind != "sum"]
        # Experts are shared too, but they come from a router's weight, or from an iota as in one-hot arrays.
        return all(self._find_origin(_places(op.inputs[1 - k], f)) in ("weight", "nothing") for f in shared)

    def is_from_weight(self, i: int, factor: int) -> bool:
        """Whether an operand of a matmul gets this factor from a weight."""
        places = [place for use in self.program.operations[i].inputs for place in _places(use, factor)]
        return self._find_origin(places) == "weight"

    def _find_origin(self, places: list[tuple[int, int]]) -> Literal["weight", "argument", "nothing"]:
        """Follows dimensions (value, position) to their origins.

        Returns "weight" if one is an output factor of a weight, else "argument" if one comes from an argument, else "nothing".
        """
        seen, found = set(places), "nothing"
        while places:
            value, at = places.pop()
            if value not in self.program.producers:
                continue
            i, position = self.program.producers[value]
            op = self.program.operations[i]
            if op.op_class == "source":
                found = "argument"
            weight = self.weight(i) if is_product(op) else None
            for factor in op.outputs[position].dims[at]:
                if weight is not None and _places(op.inputs[weight], factor):
                    return "weight"
                further = {place for use in op.inputs for place in _places(use, factor)} - seen
                seen |= further
                places += sorted(further)
        return found


def is_product(op: Operation) -> bool:
    """Whether an operation multiplies two arrays on the matrix unit."""
    return op.op_class == "matmul" and len(op.inputs) == 2


def _places(use: Use, factor: int) -> list[tuple[int, int]]:
    return [(use.value, at) for at, dim in enumerate(use.dims) if factor in dim]


def attention_part(program: Program, i: int) -> str:
    """The part of attention: "attention scores", contracted over the head size, or "attention values"."""
    roles = _attention_roles(program, i)
    summed = {role for role, factor in zip(roles, program.operations[i].factors, strict=True) if factor.kind == "sum"}
    return "attention scores" if summed == {"head-size-sharded"} else "attention values"
