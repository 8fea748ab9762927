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

A product of parameters alone (`parameters: ...`, as of LoRA's two factors) is split along contracted or output factors. A
weight's gradient (`gradient: ...`) is summed over tokens; its outputs are the weight's dimensions.

Any other contraction of two activations is attention. Its names are: `batch-sharded`, `head-sharded`,
`query-sharded` (positions of the queries), `sequence-sharded` (positions of keys and values), `head-size-sharded`.

Names of models and parameters are not used. Heads and positions are distinguished by the origin of a dimension: heads and
head sizes are output factors of earlier weights, batch and positions are not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod

from autoshard.naming.weights import factors_of, is_product, origins_of, weight_operand, weight_sources
from costmodels.machine.topology import Topology
from costmodels.program.analysis import cached_analysis
from costmodels.program.grouped import Grouped, grouped
from costmodels.program.program import Operation, Program
from search.answer.assignment import Choice, needed_layout, produced_layout
from search.formulation.layouts import Layout


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
        kind, _, roles = product_roles(program, i)
        return roles, "" if kind == "attention" else kind
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
    "tokens",
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
    groups = grouped(op)
    if groups is None:
        return None
    roles = _dimensions(op)
    if groups.hidden is not None:
        roles[groups.hidden] = "hidden columns"
    if groups.tokens is not None:
        roles[groups.tokens] = "tokens"
    roles[groups.groups] = "experts"
    return roles, "mixture of experts"


def _dimensions(op: Operation) -> list[str]:
    """Each factor as a dimension of the first result, or of the first operand that has it."""
    roles = ["a dimension"] * len(op.factors)
    for use in (*op.inputs[::-1], *op.outputs[::-1]):
        for at, dim in enumerate(use.dims):
            for factor in dim:
                roles[factor] = f"dimension {at}"
    return roles


# --- Matmuls by a weight


def weight_roles(op: Operation, weight: int) -> list[str]:
    """The role of each factor in a matmul by a weight: "contracted", "output", "batch" or "sequence"."""
    own, others = set(factors_of(op.inputs[weight].dims)), factors_of(op.inputs[1 - weight].dims)
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
    return set(stored_layout(program, choice, value).axes) - set(needed_layout(program, choice, i, weight).axes)


def stored_layout(program: Program, choice: Choice, value: int) -> Layout:
    """The layout of the largest argument that a value is made of."""
    for source in weight_sources(program, value)[:1]:
        return produced_layout(program, choice, program.operations[source].outputs[0].value)
    return produced_layout(program, choice, value)


@cached_analysis
def product_roles(program: Program, i: int) -> tuple[str, int | None, list[str]]:
    """The kind of a matmul, its weight operand, and the roles of its factors.

    "weight": a matmul by a weight, with the roles of `weight_roles`, and "experts" for factors that both operands have.
    "gradient": a weight's gradient, whose dimensions all come from weights: it is summed over "tokens". "parameters": of
    two arrays made of parameters, such as the factors of an adapter. "attention": of two other activations.
    """
    op = program.operations[i]
    if groups := grouped(op):
        return _ragged_roles(op, groups)
    origins = origins_of(program)
    weight = origins.weight(i)
    if weight is not None:
        shared = set.intersection(*(set(factors_of(use.dims)) for use in op.inputs))
        roles = weight_roles(op, weight)
        if op.primitive != "conv_general_dilated":
            roles = ["experts" if f in shared and role == "output" else role for f, role in enumerate(roles)]
        return "weight", weight, roles
    if all(origins.sources(use.value) for use in op.inputs[:2]):
        return "parameters", None, _parameter_roles(op)
    left = factors_of(op.outputs[0].dims)
    if left and all(origins.is_from_weight(i, factor) for factor in left):
        return "gradient", None, ["output" if f in left else "tokens" for f in range(len(op.factors))]
    return "attention", None, _attention_roles(program, i)


def _parameter_roles(op: Operation) -> list[str]:
    """The roles of the factors of a product of parameters: such a product may run once for each layer of a stack."""
    shared = set.intersection(*(set(factors_of(use.dims)) for use in op.inputs))
    batch = {f for f in shared if op.factors[f].kind != "sum"}
    kinds = [factor.kind for factor in op.factors]
    return ["contracted" if kind == "sum" else "batch" if f in batch else "output" for f, kind in enumerate(kinds)]


def _ragged_roles(op: Operation, groups: Grouped) -> tuple[str, int | None, list[str]]:
    """As `product_roles`, for a matmul over ragged groups: by a weight per expert, or the gradient of such weights.

    The weight of a chain is its largest. Its hidden columns are the output of its first weights.
    """
    operands = [each.operand for each in groups.matrices if each.operand is not None]
    if not operands:
        return "gradient", None, []
    sizes = {k: prod(op.factors[f].size for f in factors_of(op.inputs[k].dims)) for k in operands}
    weight = max(operands, key=lambda k: sizes[k])
    rows, matrices = set(factors_of(op.inputs[0].dims)), {f for k in operands for f in factors_of(op.inputs[k].dims)}
    roles = ["batch" if f in rows - matrices else "output" for f in range(len(op.factors))]
    roles = ["contracted" if f in rows & matrices and op.factors[f].kind == "sum" else r for f, r in enumerate(roles)]
    roles[groups.groups] = "experts"
    return "weight", weight, roles


# --- Contractions of two activations


@cached_analysis
def _attention_roles(program: Program, i: int) -> list[str]:
    """Heads come from weights, positions do not. A factor of both operands that comes from no weight is the batch."""
    op, origins = program.operations[i], origins_of(program)
    left, right = (set(factors_of(use.dims)) for use in op.inputs)
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


def attention_part(program: Program, i: int) -> str:
    """The part of attention: "attention scores", contracted over the head size, or "attention values"."""
    roles = _attention_roles(program, i)
    summed = {role for role, factor in zip(roles, program.operations[i].factors, strict=True) if factor.kind == "sum"}
    return "attention scores" if summed == {"head-size-sharded"} else "attention values"
