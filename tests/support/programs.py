"""Random programs that need no JAX, for the search.

| name | is |
|---|---|
| `programs()` | a chain of matrix products, with or without a loop and a residual sum |
| `small_programs()` | the same with few choices, for `enumeration.py` |
| `layered()`, `unrolled` | layers as a Python loop unrolls them |
| `TOPOLOGIES`, `MESHES` | small machines; those with two and three axes of two host devices |
"""

from __future__ import annotations

from hypothesis import strategies as st

from costmodels.machine import parse_topology
from costmodels.program import Factor, Operation, Program, Region, Use, Value
from costmodels.program.program import OpClass

SIZES = (4, 6, 8, 64)


@st.composite
def programs(draw, sizes: tuple[int, ...] = SIZES, products: tuple[int, ...] = (2,)) -> Program:
    """One or two matrix products and an elementwise operation after the first, with or without a loop and a residual sum."""
    loop = draw(st.booleans())
    residual = draw(st.booleans())
    rows_, inner, hidden = (draw(st.sampled_from(sizes)) for _ in range(3))
    once = draw(st.sampled_from(products)) == 1
    hidden = inner if once and (loop or residual) else hidden
    region = int(loop)
    values: list[Value] = []
    operations: list[Operation] = []

    def value(name: str, shape: tuple[int, ...], where: int) -> int:
        values.append(Value(name, shape, "bfloat16", 2.0, where))
        return len(values) - 1

    def source(name: str, shape: tuple[int, ...]) -> int:
        made = value(name, shape, 0)
        dims = tuple((i,) for i in range(len(shape)))
        operations.append(
            Operation(name, "argument", tuple(map(Factor, shape)), (), (Use(made, dims),), op_class="source")
        )
        return made

    def identity(
        name: str, ins: list[tuple[int, int]], outs: list[tuple[int, int]], kind: OpClass = "boundary"
    ) -> None:
        shape = values[ins[0][0]].shape
        dims = tuple((i,) for i in range(len(shape)))
        before, after = (tuple(Use(v, dims, r) for v, r in side) for side in (ins, outs))
        operations.append(Operation(name, name, tuple(map(Factor, shape)), before, after, op_class=kind))

    def matmul(a: int, b: int) -> int:
        (m, k), n = values[a].shape, values[b].shape[1]
        out = value(f"{values[a].name}@{values[b].name}", (m, n), region)
        factors = (Factor(m), Factor(n), Factor(k, "sum"))
        ins = (Use(a, ((0,), (2,)), region), Use(b, ((2,), (1,)), region))
        operations.append(
            Operation(
                "dot",
                "dot_general",
                factors,
                ins,
                (Use(out, ((0,), (1,)), region),),
                region,
                "matmul",
                (),
                (0, 1, -1),
                2.0,
            )
        )
        return out

    def pointwise(name: str, ins: list[int], linear=()) -> int:
        shape = values[ins[0]].shape
        out = value(name, shape, region)
        dims = tuple((i,) for i in range(len(shape)))
        uses = tuple(Use(v, dims, region) for v in ins)
        operations.append(
            Operation(
                name, name, tuple(map(Factor, shape)), uses, (Use(out, dims, region),), region, "fused", linear, (), 1.0
            )
        )
        return out

    x, up = source("x", (rows_, inner)), source("up", (inner, hidden))
    down = -1 if once else source("down", (hidden, inner))
    arguments = tuple(range(len(operations)))
    regions = [Region("main")]
    body_in = x
    if loop:
        regions.append(Region("loop", 0, draw(st.integers(2, 20))))
        body_in = value("carry", (rows_, inner), 1)
    at = len(operations)
    hidden_value = pointwise("relu", [matmul(body_in, up)])
    out = hidden_value if once else matmul(hidden_value, down)
    if residual:
        out = pointwise("add", [out, body_in], (frozenset({0, 1}),))
    result = out
    if loop:
        result = value("final", values[out].shape, 0)
        identity("loop_carry", [(x, 0), (out, 1)], [(body_in, 1), (result, 0)])
        operations.insert(at, operations.pop())
    identity("result", [(result, 0)], [], "sink")
    return Program("random", tuple(values), tuple(operations), tuple(regions), arguments, (), (len(operations) - 1,))


TOPOLOGIES = [parse_topology(text) for text in ("cpu:2", "cpu:4", "cpu:2x2", "h100:2")]


MESHES = [parse_topology(text) for text in ("cpu:2x2", "cpu:2x2x2")]
"""Meshes on which axes have an order, arrays change places (all-to-all, permutations), and several axes make one cut."""


def small_programs() -> st.SearchStrategy[Program]:
    """Programs with few enough choices on these meshes to price them all: dimensions of 3 cannot be cut."""
    return programs((2, 3, 4, 8), (1, 2))


@st.composite
def layered(draw, least: int = 2, most: int = 4, sizes: tuple[int, ...] = SIZES) -> Program:
    """Layers as a Python loop unrolls them, each with its own weights; with or without a residual sum."""
    depth, residual = draw(st.integers(least, most)), draw(st.booleans())
    tokens, inner, hidden = (draw(st.sampled_from(sizes)) for _ in range(3))
    return unrolled(depth, residual, tokens, inner, hidden)


def unrolled(depth: int, residual: bool, tokens: int, inner: int, hidden: int) -> Program:
    """So many layers of two matrix products with an elementwise operation between."""
    values: list[Value] = []
    operations: list[Operation] = []

    def made(name: str, shape: tuple[int, ...]) -> int:
        values.append(Value(name, shape, "bfloat16", 2.0))
        return len(values) - 1

    def add(name: str, ins: list[int], shape: tuple[int, ...] | None, kind: OpClass, linear=()) -> int:
        shape_ = shape or values[ins[0]].shape
        dims = ((0,), (1,))
        out = [] if kind == "sink" else [Use(made(name, shape_), dims)]
        uses, flops = tuple(Use(v, dims) for v in ins), float(kind == "fused")
        factors = tuple(map(Factor, shape_))
        operations.append(Operation(name, name, factors, uses, tuple(out), 0, kind, linear, (), flops))
        return len(values) - 1

    def matmul(a: int, b: int) -> int:
        (m, k), n = values[a].shape, values[b].shape[1]
        ins = (Use(a, ((0,), (2,))), Use(b, ((2,), (1,))))
        factors, out = (Factor(m), Factor(n), Factor(k, "sum")), Use(made("dot", (m, n)), ((0,), (1,)))
        operations.append(Operation("dot", "dot_general", factors, ins, (out,), 0, "matmul", (), (0, 1, -1), 2.0))
        return len(values) - 1

    x = add("x", [], (tokens, inner), "source")
    weights = [
        (add(f"up[{i}]", [], (inner, hidden), "source"), add(f"down[{i}]", [], (hidden, inner), "source"))
        for i in range(depth)
    ]
    arguments = tuple(range(len(operations)))
    for up, down in weights:
        out = matmul(add("relu", [matmul(x, up)], None, "fused"), down)
        x = add("add", [out, x], None, "fused", (frozenset({0, 1}),)) if residual else out
    add("result", [x], None, "sink")
    return Program("layers", tuple(values), tuple(operations), arguments=arguments, results=(len(operations) - 1,))
