"""Strategies by name: a table of splits, and what they are called."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from autoshard.naming.strategy_names import product_roles, strategy_name
from autoshard.naming.weights import Origins, weight_operand
from costmodels.machine.topology import parse_topology
from costmodels.program.program import Program
from search.answer.assignment import Choice
from search.formulation.strategies import Strategy
from tests.support.tracing import trace

MESH = parse_topology("v4:4x4x4")


def of(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def split(text: str) -> tuple[tuple[str, ...], ...]:
    """`"x yz -"` as the mesh axes of three factors or dimensions."""
    return tuple(() if part == "-" else tuple(part) for part in text.split())


def choice(program: Program, matmul: int, splits: str, stored: dict[str, str]) -> Choice:
    """Nothing is split but one operation's factors and the arguments in `stored`."""
    strategies = [Strategy(((),) * len(op.factors), ((),) * len(op.linear)) for op in program.operations]
    strategies[matmul] = Strategy(split(splits), strategies[matmul].carried)
    for i in program.arguments:
        if program.operations[i].name in stored:
            strategies[i] = Strategy(split(stored[program.operations[i].name]))
    return Choice(tuple(strategies), {})


def name(fn, args, splits: str, which: int = 0, **stored: str) -> str:
    program = trace(fn, *args).program
    matmul = [i for i, _ in program.matmuls()][which]
    return strategy_name(program, MESH, choice(program, matmul, splits, stored), matmul)


# --- A weight: factors are batch, output, contracted


def project(x, w):
    return jnp.einsum("be,ef->bf", x, w)


@pytest.mark.parametrize(
    ("splits", "stored", "expected"),
    [
        ("- - -", "- -", "replicated"),
        ("- xyz -", "- xyz", "WS-1D: output over xyz"),
        ("- zyx -", "- zyx", "WS-1D: output over xyz"),
        ("- - xyz", "xyz -", "WS-1D: contracted over xyz"),
        ("- yz x", "x yz", "WS-2D: contracted over x, output over yz"),
        ("x z y", "y z", "WS-2D: contracted over y, output over z, batch over x"),
        ("yz - x", "x -", "WS-1D: contracted over x, batch over yz"),
        ("- x -", "- x", "WS-1D: output over x, repeated over yz"),
        ("xyz - -", "- -", "data parallel: batch over xyz"),
        ("xy - -", "- -", "data parallel: batch over xy, repeated over z"),
        ("x yz -", "x yz", "WG-X: output over yz, batch over x"),
        ("xy z -", "xy z", "WG-XY: output over z, batch over xy"),
        ("xyz - -", "xyz -", "WG-XYZ: batch over xyz"),
        ("xyz - -", "x zy", "WG-XYZ: batch over xyz"),
        ("- - -", "x -", "WG-X: repeated over xyz"),
        ("- x yz", "- -", "WS-2D: contracted over yz, output over x"),
    ],
)
def test_a_matmul_by_a_weight(splits: str, stored: str, expected: str) -> None:
    assert name(project, (of(64, 256), of(256, 512)), splits, w=stored) == expected


def test_the_weight_may_be_the_first_operand() -> None:
    def transposed(w, x):
        return lax.dot_general(w, jnp.tanh(x), (((0,), (1,)), ((), ())))  # [F, B]

    assert name(transposed, (of(256, 512), of(64, 256)), "xy z -", w="- xy") == "WS-1D: output over xy, batch over z"


def test_of_several_activation_factors_the_first_is_the_batch() -> None:
    args = of(4, 64, 256), of(256, 512)
    assert name(lambda x, w: x @ w, args, "x yz - -") == "data parallel: batch over x, sequence over yz"


def test_a_layer_of_a_stack_is_stored_as_the_stack_is() -> None:
    def layers(x, w):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w.astype(x.dtype)), None), x, w)[0]

    args = of(64, 256), jax.ShapeDtypeStruct((8, 256, 256), jnp.int8)
    assert name(layers, args, "xy z -", w="- xy z") == "WG-XY: output over z, batch over xy"
    assert name(layers, args, "- z xy", w="- xy z") == "WS-2D: contracted over xy, output over z"


def test_an_input_feeds_several_matmuls_and_a_weight_one() -> None:
    program = trace(lambda wq, wk, x: (wq @ x, wk @ x), of(512, 256), of(512, 256), of(256, 64)).program
    assert [weight_operand(program, i) for i, _ in program.matmuls()] == [0, 0]


# --- Attention


def multiquery(x, wq, wk, cache):
    """Decode: one token a sequence, one head of keys. Factors are batch, heads, positions, head size (summed)."""
    q = jnp.einsum("be,ehd->bhd", x, wq)
    k = lax.dynamic_update_slice(cache, jnp.einsum("be,ed->bd", x, wk)[:, None], (0, 3, 0))
    p = jax.nn.softmax(jnp.einsum("bhd,bsd->bhs", q, k))
    return jnp.einsum("bhs,bsd->bhd", p, k)


MULTIQUERY = of(64, 256), of(256, 16, 128), of(256, 128), of(64, 512, 128)


def multihead(x, wq, wk):
    """Prefill with as many heads of keys as of queries. Factors are batch, heads, queries, positions, head size."""
    q, k = jnp.einsum("bte,ehd->bhtd", x, wq), jnp.einsum("bse,ehd->bhsd", x, wk)
    p = jax.nn.softmax(jnp.einsum("bhtd,bhsd->bhts", q, k))
    return jnp.einsum("bhts,bhsd->bhtd", p, k)


MULTIHEAD = of(4, 64, 256), of(256, 16, 128), of(256, 16, 128)


@pytest.mark.parametrize(
    ("fn", "args", "which", "splits", "expected"),
    [
        (multiquery, MULTIQUERY, 2, "xyz - - -", "batch-sharded over xyz"),
        (multiquery, MULTIQUERY, 2, "x yz - -", "batch-sharded over x, head-sharded over yz"),
        (
            multiquery,
            MULTIQUERY,
            2,
            "- x y z",
            "head-sharded over x, sequence-sharded over y, head-size-sharded over z",
        ),
        (multiquery, MULTIQUERY, 3, "x - - yz", "batch-sharded over x, sequence-sharded over yz"),
        (multiquery, MULTIQUERY, 3, "- xy z -", "head-sharded over xy, head-size-sharded over z"),
        (multiquery, MULTIQUERY, 3, "- - - -", "replicated"),
        (multihead, MULTIHEAD, 2, "x y z - -", "batch-sharded over x, head-sharded over y, query-sharded over z"),
        (multihead, MULTIHEAD, 2, "- xy - z -", "head-sharded over xy, sequence-sharded over z"),
        (multihead, MULTIHEAD, 3, "- x - - y", "head-sharded over x, sequence-sharded over y, repeated over z"),
    ],
)
def test_a_contraction_of_activations(fn, args, which: int, splits: str, expected: str) -> None:
    assert name(fn, args, splits, which) == expected


def test_a_cache_that_is_an_argument_is_no_weight() -> None:
    def attend(x, wq, cache):
        return jnp.einsum("bhd,bsd->bhs", jnp.einsum("be,ehd->bhd", x, wq), cache)

    program = trace(attend, of(64, 256), of(256, 16, 128), of(64, 512, 128)).program
    assert [weight_operand(program, i) for i, _ in program.matmuls()] == [1, None]


def test_experts_are_weights() -> None:
    def experts(x, router, w):
        gates = jax.nn.softmax(x @ router)
        rows = jnp.einsum("te,tx->xte", x, gates)
        return jnp.einsum("xte,xef->xtf", rows, w)

    program = trace(experts, of(64, 256), of(256, 8), of(8, 256, 512)).program
    assert [weight_operand(program, i) for i, _ in program.matmuls()][-1] == 1


def test_attention_over_a_cache_in_a_loop() -> None:
    def layers(x, w, caches):
        def layer(x, scanned):
            w, cache = scanned
            scores = jnp.einsum("bhd,bsd->bhs", jnp.einsum("be,ehd->bhd", x, w), cache)
            return jnp.einsum("bhs,bsd,ehd->be", scores, cache, w), None

        return lax.scan(layer, x, (w, caches))[0]

    program = trace(layers, of(64, 256), of(8, 256, 16, 128), of(8, 64, 512, 128)).program
    assert [weight_operand(program, i) for i, _ in program.matmuls()] == [1, None, None, 1]


# --- Other operations


def test_other_operations_are_described_by_dimensions() -> None:
    def norm(x):
        return jnp.tanh(x)

    program = trace(norm, of(64, 256)).program
    op = next(i for i, op in enumerate(program.operations) if op.primitive == "tanh")
    assert (
        strategy_name(program, MESH, choice(program, op, "x yz", {}), op) == "dimension 0 over x, dimension 1 over yz"
    )
    assert strategy_name(program, MESH, choice(program, op, "- -", {}), op) == "replicated"


def test_partial_sums_that_pass_through_are_said() -> None:
    program = trace(lambda x, y: x + y, of(64, 256), of(64, 256)).program
    op = next(i for i, op in enumerate(program.operations) if op.primitive == "add")
    strategies = list(choice(program, op, "y -", {}).strategies)
    strategies[op] = Strategy(strategies[op].splits, (("x", "z"),))
    said = strategy_name(program, MESH, Choice(tuple(strategies), {}), op)
    assert said == "dimension 0 over y, partial sums over xz"


def images(kernels, images):
    for kernel in kernels:
        dims = ("NHWC", "HWIO", "NHWC")
        images = jax.nn.relu(lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=dims))
    return images


@pytest.mark.parametrize("rounds", [1, 9])
def test_products_of_a_deep_network_are_not_judged_path_by_path(rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    judged = []
    one = Origins._is_weight
    monkeypatch.setattr(Origins, "_is_weight", lambda self, i, k: judged.append((i, k)) or one(self, i, k))

    def fn(matrices, x):
        if rounds == 1:
            return one_by_one(matrices, x)
        return lax.fori_loop(0, rounds, lambda _, x: one_by_one(matrices, x), x)  # all lead to all, round and round

    program = trace(fn, [of(4, 8, 8)] * 12, of(4, 8)).program
    assert {weight_operand(program, i) for i, _ in program.matmuls()} == {None}
    assert len(judged) <= (2 * 12 if rounds == 1 else 2 * 12**2)


def one_by_one(matrices, x):
    """Every product shares the batch, which leads to all products before it: one after the other they are 2^n paths."""
    for matrix in matrices:
        x = jnp.einsum("bd,bde->be", x, matrix)
    return x


def test_a_kernel_is_the_weight_of_a_convolution() -> None:
    program = trace(images, [of(3, 3, 8, 8)] * 2, of(8, 16, 16, 8)).program
    for i, op in program.matmuls():
        assert weight_operand(program, i) == 1
        batch = op.inputs[0].dims[0][-1]  # after groups of the batch
        splits = " ".join("xyz" if factor == batch else "-" for factor in range(len(op.factors)))
        assert strategy_name(program, MESH, choice(program, i, splits, {}), i) == "data parallel: batch over xyz"


def test_groups_of_a_convolution_are_no_experts() -> None:
    def grouped(kernel, images):
        dims = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=dims, feature_group_count=4)

    program = trace(grouped, of(3, 3, 2, 8), of(8, 16, 16, 8)).program
    ((i, _),) = program.matmuls()
    kind, operand, roles = product_roles(program, i)
    assert (kind, operand) == ("weight", 1) and "experts" not in roles
