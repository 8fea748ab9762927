"""The layouts of published programs, as the strategies that their matmuls may take; all else is left to the search."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.measured_programs import Model
from costmodels.program.program import Operation, Program
from search.formulation.strategies import Strategy

Allow = Callable[[int, Strategy], bool]
_LARGE = 1 << 20
"""Elements from which on an argument is sharded as a weight."""


def tensor_parallel(program: Program, axes: Sequence[str], kv_axes: Sequence[str] | None = None) -> Allow:
    """Megatron's layout: heads, the feed-forward network and the vocabulary are split over all axes, activations over none.

    **Arguments:**

    - `kv_axes`: the axes that split key and value heads; further axes split the query heads of each. By default as many
      as the search likes.
    """

    def allow(i: int, strategy: Strategy) -> bool:
        op = program.operations[i]
        if op.op_class != "matmul":
            return True
        batch = op.inputs[0].dims[0][0]
        if strategy.splits[batch]:
            return False
        if _weight(program, op) is None:
            return len(strategy.axes) == len(axes)
        outputs = {f for dim in op.outputs[0].dims for f in dim}
        residual = [f for f in _widths(program, op) if f not in outputs or op.factors[f].kind != "sum"]
        if any(strategy.splits[f] for f in residual):
            return False
        heads = kv_axes if kv_axes is not None and _is_kv(program, op) else axes
        return set(strategy.axes) == set(heads)

    return allow


def _weight(program: Program, op: Operation) -> int | None:
    found = [k for k, use in enumerate(op.inputs) if program.values[use.value].origin]
    return found[0] if found else None


def _widths(program: Program, op: Operation) -> list[int]:
    """The factors of the residual stream's width in a product with a weight: contracted by all but those that return to it."""
    weight = op.inputs[_weight(program, op) or 0]
    dims = [f for dim in weight.dims for f in dim]
    return [dims[-1]] if _returns(program, op) else dims[:1]


def _returns(program: Program, op: Operation) -> bool:
    return any(f"'{name}'" in op.name for name in ("wo", "down"))


def _is_kv(program: Program, op: Operation) -> bool:
    return any(f"'{name}'" in op.name for name in ("wk", "wv"))


def fully_sharded(program: Program, model: Model, batch: int, data: Sequence[str], tensor: Sequence[str] = ()) -> Allow:
    """FSDP, or FSDP and tensor parallelism: every matmul splits its batch over `data`, heads and the rest over `tensor`.

    Arguments are sharded over all axes.
    """
    wide = {model.heads, model.kv_heads, model.ffn, model.vocab}

    def allow(i: int, strategy: Strategy) -> bool:
        op = program.operations[i]
        if op.op_class == "source":
            elements = program.values[op.outputs[0].value].bytes / program.values[op.outputs[0].value].itemsize
            return elements < _LARGE or set(strategy.axes) == {*data, *tensor}
        if op.op_class != "matmul":
            return True
        leading = [use.dims[0][0] for use in op.inputs if not program.values[use.value].origin]
        rows = next((f for f in leading if op.factors[f].size == batch), None)
        if rows is None:
            return True
        if strategy.splits[rows] != tuple(data):
            return False
        others = [(op.factors[f].size, used) for f, used in enumerate(strategy.splits) if used and f != rows]
        return all(size in wide for size, _ in others) and {a for _, used in others for a in used} == set(tensor)

    return allow
