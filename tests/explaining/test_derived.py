"""Pope et al. 2022 and Ouyang 2023, derived: from traced blocks in plain JAX and pinned layouts, the papers' own formulas.

Pope et al.'s volumes are elements that one chip sends, gathered size, $(K-1)/K = 1$ (appendix A.1): `exact=False`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import sqrt

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

import autoshard
from autoshard.explaining.crossovers import Block, blocks, crossover_text, crossovers, volume_sent, volumes
from autoshard.explaining.formulas import array_bytes
from autoshard.explaining.model_shares import breakdown
from autoshard.explaining.named_layouts import Split, families, find_collectives, least_steps, pin_by_name, total_volume
from benchmarks.published_crossovers import crossover_rows
from costmodels.machine.lazy_sympy import sympy
from costmodels.machine.topology import parse_topology
from costmodels.program.program import Operation
from costmodels.symbols import axis_size, dimension, evaluate
from examples import palm
from search.formulation.layouts import Layout
from tests.support.effort import mostly_long

B, L, E, F, H, D, S, G, Q, V, N = (dimension(name) for name in ("B", "L", "E", "F", "H", "D", "S", "G", "Q", "V", "N"))
X, Y, Z = (axis_size(name) for name in "xyz")
TORUS = parse_topology("v4:4x4x4")
SIZES = {"x": 4, "y": 4, "z": 4}
BYTES = 2  # of a bfloat16


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.bfloat16)


def feed_forward(x, wi, wo):
    return jax.nn.gelu(x @ wi) @ wo


def gated_feed_forward(x, wi_gate, wi_up, wo):
    return (jax.nn.silu(x @ wi_gate) * (x @ wi_up)) @ wo


@cache
def block(gated: bool) -> Block:
    x, wi, wo = shape(8, 16, 64), shape(64, 256), shape(256, 64)
    fn, args = (gated_feed_forward, (x, wi, wi, wo)) if gated else (feed_forward, (x, wi, wo))
    trace = autoshard.trace_symbolic(fn, *args, dims={"x": "B L E", "wo": "F E"})
    (found,) = blocks(trace.program, trace.dimensions)
    return found


def same(ours, paper) -> bool:
    return sympy.simplify(ours - paper) == 0


# --- the feed-forward network (Pope et al. 2022, §3.2)

PAPER = {
    "WS-1D": 2 * B * L * E,
    "WS-2D": 2 * B * L * (E / X + F / (Y * Z)),
    "WG-X": 2 * E * F * X / (X * Y * Z) + 2 * B * L * E / X,
    "WG-XY": 2 * E * F * X * Y / (X * Y * Z) + 2 * B * L * E / (X * Y),
    "WG-XYZ": 2 * E * F,
}

# The in-projection is 2F wide: of weights 3 EF, and 2F to reduce-scatter beside F to all-gather.
GATED = {
    "WS-1D": 2 * B * L * E,
    "WS-2D": 2 * B * L * E / X + 3 * B * L * F / (Y * Z),
    "WG-X": 3 * E * F / (Y * Z) + 2 * B * L * E / X,
    "WG-XY": 3 * E * F / Z + 2 * B * L * E / (X * Y),
    "WG-XYZ": 3 * E * F,
}


@pytest.mark.parametrize("name", PAPER)
def test_volumes_are_the_papers(name: str) -> None:
    assert same(volumes(block(False), TORUS)[name] / BYTES, PAPER[name])


@pytest.mark.parametrize("name", GATED)
def test_volumes_of_a_gated_network(name: str) -> None:
    assert same(volumes(block(True), TORUS)[name] / BYTES, GATED[name])


def test_exact_volumes_have_the_part_that_a_chip_has_already() -> None:
    found = volumes(block(False), TORUS, exact=True)
    assert same(found["WS-1D"] / BYTES, 2 * B * L * E * (X * Y * Z - 1) / (X * Y * Z))
    scattered = E / X * (Y * Z - 1) / (Y * Z) + F / (Y * Z) * (X - 1) / X
    assert same(found["WS-2D"] / BYTES, 2 * B * L * scattered)
    assert same(found["WG-XYZ"] / BYTES, 2 * E * F * (X * Y * Z - 1) / (X * Y * Z))


@pytest.mark.parametrize("gated", (False, True))
def test_the_best_x_is_the_papers(gated: bool) -> None:
    """dT/dX = 0 at X = sqrt(nE/F), for a gated network at sqrt(2nE/3F), with YZ = n/X."""
    n = dimension("n")
    volume = volumes(block(gated), TORUS)["WS-2D"].subs(Z, n / (X * Y))
    (best,) = sympy.solve(sympy.diff(volume, X), X)
    assert same(best**2, n * E / F * (sympy.Rational(2, 3) if gated else 1))
    if not gated:
        assert evaluate(best, {"n": 64, "E": 1, "F": 4}) == sqrt(64) / 2
        assert same(volume.subs(X, best).subs(F, 4 * E) / BYTES, 8 * B * L * E / sympy.sqrt(n))


def test_two_dimensions_beat_one_above_sixteen_chips() -> None:
    """Where F = 4E: sqrt(n) > F/E."""
    n = dimension("n")
    found = volumes(block(False), TORUS)
    best = found["WS-2D"].subs(Z, n / (X * Y)).subs(X, sympy.sqrt(n * E / F))
    assert sympy.solve(best.subs(F, 4 * E) - found["WS-1D"], n) == [16]


def test_crossovers_of_palm_540b_are_the_papers() -> None:
    rows = [row for row in crossover_rows() if row["reference"] is not None]
    assert [row["ours"] for row in rows] == [row["reference"] for row in rows] == [18_432, 73_728, 884_736]
    assert [row["formula"] for row in rows] == ["E", "F·X/Z", "F·X·Y·(Z - 1)/Z"]


@pytest.mark.parametrize("gated", (False, True))
@pytest.mark.parametrize("exact", (False, True))
@pytest.mark.parametrize(
    "mesh", mostly_long(("v4:4x4x4", "v4:2x4x8", "v5e:4x8", "h100:2x8", "v5e:8"), "v4:2x4x8", "v5e:8")
)
def test_at_a_crossover_both_layouts_send_as_much(mesh: str, exact: bool, gated: bool) -> None:
    topology = parse_topology(mesh)
    numbers = {name: float(n) for name, n in block(gated).dimensions.sizes.items()}
    numbers |= {name.upper(): float(size) for name, size in topology.axis_sizes.items()}
    found = volumes(block(gated), topology, exact)
    every = crossovers(block(gated), topology, exact)
    assert [each.above for each in every[:-1]] == [each.below for each in every[1:]]
    for each in every:
        at = numbers | {"B": each.number / numbers["L"]}
        assert evaluate(found[each.below], at) == pytest.approx(evaluate(found[each.above], at))
        assert min(evaluate(other, at) for other in found.values()) == pytest.approx(evaluate(found[each.above], at))
        assert f"{each.above} sends less than {each.below} from B·L = " in crossover_text(each, block(gated))


@cache
def solved(mesh: str):
    topology = parse_topology(mesh)
    numbers = {name: float(n) for name, n in block(True).dimensions.sizes.items()}
    numbers |= {name.upper(): float(size) for name, size in topology.axis_sizes.items()}
    return numbers, volumes(block(True), topology), crossovers(block(True), topology)


@given(tokens=st.floats(1.0, 1e8), mesh=st.sampled_from(["v4:4x4x4", "v4:2x4x8", "v5e:4x8"]))
def test_crossovers_name_the_layout_that_sends_least(tokens: float, mesh: str) -> None:
    numbers, sums, every = solved(mesh)
    found = {name: evaluate(each, {**numbers, "B": tokens / numbers["L"]}) for name, each in sums.items()}
    passed = [each.above for each in every if each.number <= tokens]
    chosen = passed[-1] if passed else every[0].below
    assert found[chosen] == pytest.approx(min(found.values()))


def test_blocks_are_found_in_whole_models() -> None:
    for weights in ("bf16", "int8"):
        work = palm.decode(weights=weights)
        trace = autoshard.trace_symbolic(work.fn, *work.args, dims=work.dims)
        (found,) = blocks(trace.program, trace.dimensions)
        assert (found.contracted, found.output, found.tokens) == (("E",), ("F",), ("B",))
        size = 2 if weights == "bf16" else 1
        assert same(volumes(found, TORUS)["WG-XYZ"], 3 * E * F * size)
    assert same(volume_sent(found, families("xyz")[1], TORUS), 2 * (2 * B * E / X + 3 * B * F / (Y * Z)))


# --- attention (Pope et al. 2022, §3.3)


def attention(q, k, v):
    """`[B, L, H, D]` against `[B, S, G, D]`, every head of keys and values for H/G of queries."""
    scores = jnp.einsum("blgqd,bsgd->blgqs", q, k)
    return jnp.einsum("blgqs,bsgd->blgqd", jax.nn.softmax(scores), v)


def shared_attention(q, k, v):
    """Multiquery: `[B, L, H, D]` against `[B, S, D]`."""
    scores = jnp.einsum("blhd,bsd->blhs", q, k)
    return jnp.einsum("blhs,bsd->blhd", jax.nn.softmax(scores), v)


HEADS, BATCH = {"H": ("x", "y", "z")}, {"B": ("x", "y", "z")}


def attended(fn: Callable, cache: tuple[int, ...], names: str, inside: Split, stored: Split):
    """What attention sends, and the elements of keys and values on one chip; queries come and results go by heads."""
    queries = (64, 1, 64, 16) if fn is shared_attention else (64, 1, 64, 1, 16)
    dims = {"q": "B L H D" if fn is shared_attention else "B L H _ D", "k": names, "v": names}
    trace = autoshard.trace_symbolic(fn, shape(*queries), shape(*cache), shape(*cache), dims=dims)
    program, dimensions = trace.program, trace.dimensions

    def splits(i: int, op: Operation) -> Split:
        if op.op_class == "source":
            return HEADS if op.name == "q" else stored
        return HEADS if op.op_class == "sink" else inside

    choice = pin_by_name(program, dimensions, splits, "xyz")
    keys = [i for i in program.arguments if program.operations[i].name in ("k", "v")]
    held = sum(
        array_bytes(program, dimensions, program.operations[i].outputs[0].value)
        / sympy.Mul(*(axis_size(axis) for split in choice.strategies[i].splits for axis in split))
        for i in keys
    )
    return total_volume(find_collectives(program, dimensions, SIZES, choice)) / BYTES, held / BYTES


def test_multihead_attention_by_heads_sends_nothing() -> None:
    volume, held = attended(attention, (64, 128, 64, 16), "B S H D", HEADS, HEADS)
    assert volume == 0 and same(held, 2 * B * S * H * D / (X * Y * Z))


def test_multiquery_attention_by_heads_holds_the_whole_cache() -> None:
    volume, held = attended(shared_attention, (64, 128, 16), "B S D", HEADS, {})
    assert volume == 0 and same(held, 2 * B * S * D)


def test_multiquery_attention_by_batch_exchanges_queries_and_results() -> None:
    volume, held = attended(shared_attention, (64, 128, 16), "B S D", BATCH, BATCH)
    assert same(volume, 2 * B * L * H * D / (X * Y * Z))
    assert same(held, 2 * B * S * D / (X * Y * Z))


# --- steps


_DIMS = ((), ("x",), ("y",), ("x", "y"), ("y", "x"))


@given(left=st.sampled_from(_DIMS), right=st.sampled_from(_DIMS), partial=st.sampled_from([(), ("z",)]))
def test_least_steps_lead_where_they_should(left, right, partial) -> None:
    source, target = Layout((left, ()), partial), Layout((right, ()))
    at = source
    for step in least_steps(source, target, SIZES):
        assert step.source == at
        at = step.target
    assert at == target


def test_gathers_that_follow_one_another_send_as_much_as_one() -> None:
    """V/Y (X-1)/X + V (Y-1)/Y = V (XY-1)/(XY), the identity by which volumes are merged."""
    assert same(V / Y * (X - 1) / X + V * (Y - 1) / Y, V * (X * Y - 1) / (X * Y))


# --- whole models (Ouyang 2023): parameters, FLOPs, activations by kind of operation


def shares(fn, *args, dims, donate_argnums=()):
    trace = autoshard.trace_symbolic(fn, *args, dims=dims, donate_argnums=donate_argnums)
    return trace, {row.kind: row for row in breakdown(trace.program, trace.dimensions)}


def table(fn, *args, dims) -> dict[str, tuple]:
    """Kind to parameters, FLOPs and activation elements, of products alone."""
    _, found = shares(fn, *args, dims=dims)
    return {
        kind: (each.parameters, each.flops, each.activation_bytes / BYTES)
        for kind, each in found.items()
        if kind not in ("elementwise", "lookups and updates")
    }


def assert_same_table(ours: dict[str, tuple], paper: dict[str, tuple]) -> None:
    assert list(ours) == list(paper)
    for kind, row in paper.items():
        for mine, theirs in zip(ours[kind], row, strict=True):
            assert same(mine, sympy.sympify(theirs)), (kind, mine, theirs)


def test_the_shares_of_palm() -> None:
    work = palm.decode()
    trace, found = shares(work.fn, *work.args, dims=work.dims, donate_argnums=work.donate_argnums)
    parameters = sympy.Add(*(row.parameters for row in found.values()))
    norms = L * E + E
    assert same(parameters, L * (3 * E * F + 2 * E * H * D + 2 * E * D) + V * E + norms)
    number = evaluate(parameters - norms, trace.sizes)
    assert number == pytest.approx(558.174e9, rel=1e-6)  # with 64 padded heads
    assert evaluate(parameters - norms, {**trace.sizes, "H": 48}) == pytest.approx(540.357e9, rel=1e-6)
    for name in ("wi_gate", "wi_up", "wo_ffn"):
        assert same(found[f"params['layers']['{name}']"].flops, 2 * B * L * E * F)
    assert same(found["attention scores"].flops, 2 * B * L * H * S * D)
    assert same(found["attention values"].flops, 2 * B * L * H * S * D)
    assert same(found["params['embedding']"].flops, 2 * B * V * E)


def test_bytes_of_the_cache_per_token() -> None:
    """PaLM 540B, one head of keys and values: 2 · 118 · 256 elements of 2 bytes."""
    work = palm.decode()
    trace, _ = shares(work.fn, *work.args, dims=work.dims)
    sources = [trace.program.operations[i].outputs[0].value for i in trace.program.arguments]
    held = sympy.Add(
        *(
            array_bytes(trace.program, trace.dimensions, v)
            for v in sources
            if trace.program.values[v].name.startswith("cache")
        )
    )
    assert same(held / (B * S), 2 * L * D * BYTES)
    assert evaluate(held / (B * S), trace.sizes) == 120_832


def test_the_shares_of_a_llama_style_block() -> None:
    """Grouped queries (G heads of keys and values, Q queries each), SwiGLU, one after the other."""

    def layer(x, wq, wk, wv, wo, w1, w3, w2):
        q = jnp.einsum("ble,egqd->blgqd", x, wq)
        k, v = jnp.einsum("bse,egd->bsgd", x, wk), jnp.einsum("bse,egd->bsgd", x, wv)
        weights = jax.nn.softmax(jnp.einsum("blgqd,bsgd->bgqls", q, k))
        x = x + jnp.einsum("blgqd,gqde->ble", jnp.einsum("bgqls,bsgd->blgqd", weights, v), wo)
        return x + (jax.nn.silu(x @ w1) * (x @ w3)) @ w2

    b, n, e, f, g, q, d = 2, 12, 40, 56, 2, 3, 10
    matrices = ((e, g, q, d), (e, g, d), (e, g, d), (g, q, d, e), (e, f), (e, f), (f, e))
    dims = {"x": "B L E", "wq": "E G Q D", "wk": "_ _ D", "wv": "_ _ D", "w1": "_ F"}
    ours = table(layer, shape(b, n, e), *(shape(*each) for each in matrices), dims=dims)
    projected, hidden = 2 * B * L * E * G * D, 2 * B * L * E * F
    assert_same_table(
        ours,
        {
            "wq": (E * G * Q * D, Q * projected, B * L * G * Q * D),
            "wk": (E * G * D, projected, B * L * G * D),
            "wv": (E * G * D, projected, B * L * G * D),
            "attention scores": (0, 2 * B * G * Q * L**2 * D, B * G * Q * L**2),
            "attention values": (0, 2 * B * G * Q * L**2 * D, B * L * G * Q * D),
            "wo": (E * G * Q * D, Q * projected, B * L * E),
            "w1": (E * F, hidden, B * L * F),
            "w3": (E * F, hidden, B * L * F),
            "w2": (E * F, hidden, B * L * E),
        },
    )


def test_the_shares_of_a_gpt_style_block() -> None:
    """One matrix for queries, keys and values, as many heads of each, GELU: 12 E^2 parameters where F = 4E and HD = E."""

    def layer(x, wqkv, wo, w1, w2):
        q, k, v = jnp.moveaxis(jnp.einsum("ble,ethd->blthd", x, wqkv), 2, 0)
        weights = jax.nn.softmax(jnp.einsum("blhd,bshd->bhls", q, k))
        x = x + jnp.einsum("blhd,hde->ble", jnp.einsum("bhls,bshd->blhd", weights, v), wo)
        return x + jax.nn.gelu(x @ w1) @ w2

    b, n, e, f, h, d = 2, 12, 48, 192, 4, 12
    matrices = ((e, 3, h, d), (h, d, e), (e, f), (f, e))
    dims = {"x": "B L E", "wqkv": "E 3 H D", "w1": "_ F"}
    ours = table(layer, shape(b, n, e), *(shape(*each) for each in matrices), dims=dims)
    assert_same_table(
        ours,
        {
            "wqkv": (3 * E * H * D, 6 * B * L * E * H * D, 3 * B * L * H * D),
            "attention scores": (0, 2 * B * H * L**2 * D, B * H * L**2),
            "attention values": (0, 2 * B * H * L**2 * D, B * L * H * D),
            "wo": (E * H * D, 2 * B * L * E * H * D, B * L * E),
            "w1": (E * F, 2 * B * L * E * F, B * L * F),
            "w2": (E * F, 2 * B * L * E * F, B * L * E),
        },
    )
    parameters = sympy.Add(*(row[0] for row in ours.values()))
    assert same(parameters.subs(F, 4 * E).subs(H, E / D), 12 * E**2)
