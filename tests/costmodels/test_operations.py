"""Operations: numbers are those of the expressions, padding is whole tiles, and more work is never faster."""

from dataclasses import replace
from math import ceil, prod

import numpy as np
import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from costmodels.machine import Chip, catalogue, chip
from costmodels.operations import (
    evaluate,
    flops,
    hbm_bytes,
    matrix_factors,
    padded_flops,
    price,
    shards_symbol,
    size_symbol,
    tile_symbol,
)
from costmodels.program import Factor, Operation, Output, Program, Use, Value

SIZES = (1, 2, 8, 48, 64, 96, 128, 160, 512, 1152, 4096)
LETTERS = "bmnk"
CUTS = (1, 2, 4)

sizes_of = st.fixed_dictionaries({letter: st.sampled_from(SIZES) for letter in LETTERS})
cuts_of = st.lists(st.tuples(*[st.sampled_from(CUTS)] * len(LETTERS)), min_size=1, max_size=4)
chips = st.sampled_from(list(catalogue().values()))


def matmul(sizes: dict[str, int]) -> Program:
    """`bmk,bkn->bmn`, bfloat16."""
    spec = ("bmk", "bkn", "bmn")
    values = tuple(Value(each, tuple(sizes[x] for x in each), "bfloat16", 2.0) for each in spec)
    uses = [Use(i, tuple((LETTERS.index(x),) for x in each)) for i, each in enumerate(spec)]
    factors = tuple(Factor(sizes[x], "sum" if x == "k" else "parallel") for x in LETTERS)
    op = Operation(
        "product",
        "dot_general",
        factors,
        (uses[0], uses[1]),
        (uses[2],),
        op_class="matmul",
        traffic=(0, 1, Output()),
        flops_per_point=2.0,
    )
    return Program("product", values, (op,))


def priced(sizes: dict[str, int], cuts, on: Chip):
    program = matmul(sizes)
    return price(program, program.operations[0], np.array(cuts, dtype=float), on)


def whole(n: float, tile: float) -> float:
    return tile * ceil(n / tile)


def by_hand(sizes: dict[str, float], tile: float) -> float:
    b, m, n, k = (sizes[x] for x in LETTERS)
    one = max(m, tile / 2) * whole(n, tile)
    other = max(n, tile / 2) * whole(m, tile)
    return 2 * b * whole(k, tile) * min(one, other)


# Symbols and numbers


@given(sizes_of, cuts_of, chips)
def test_numbers_are_those_of_the_expressions(sizes, cuts, on):
    program = matmul(sizes)
    op, rows = program.operations[0], np.array(cuts, dtype=float)
    for expression in (flops(op), padded_flops(op), hbm_bytes(program, op)):
        numbers = evaluate(expression, op, rows, on.matrix_tile)
        for row, number in zip(cuts, numbers, strict=True):
            stands_for = {size_symbol(i): sizes[x] for i, x in enumerate(LETTERS)}
            stands_for |= {shards_symbol(i): cut for i, cut in enumerate(row)} | {tile_symbol(): int(on.matrix_tile)}
            assert float(sympy.N(expression.xreplace(stands_for))) == pytest.approx(number, rel=1e-12)


@given(sizes_of, cuts_of, chips)
def test_a_product_is_priced_by_the_roofline_of_whole_tiles(sizes, cuts, on):
    found = priced(sizes, cuts, on)
    for i, row in enumerate(cuts):
        local = {x: sizes[x] / cut for x, cut in zip(LETTERS, row, strict=True)}
        b, m, n, k = local.values()
        compute = by_hand(local, on.matrix_tile) / on.reached_matmul_flops_per_second("bfloat16")
        memory = 2 * b * (m * k + k * n + m * n) / on.reached_hbm_bytes_per_second
        assert found.flops[i] == pytest.approx(2 * prod(local.values()))
        stored = b * m * n / on.vector_elements_per_second if on.vector_elements_per_second else 0.0
        assert found.seconds[i] == pytest.approx(max(compute, memory + stored) + on.op_overhead_seconds)


def test_the_factors_of_a_product():
    found = matrix_factors(matmul(dict(zip(LETTERS, (2, 3, 4, 5), strict=True))).operations[0])
    assert found is not None
    assert (found.batch, found.rows, found.columns, found.contracted) == ((0,), (1,), (2,), (3,))


# Laws


@given(sizes_of, cuts_of, chips, st.sampled_from(LETTERS), st.integers(1, 300))
def test_a_larger_product_is_never_faster(sizes, cuts, on, letter, more):
    larger = {**sizes, letter: sizes[letter] + more}
    less, much = priced(sizes, cuts, on), priced(larger, cuts, on)
    for quantity in ("flops", "bytes", "compute_seconds", "memory_seconds", "seconds"):
        assert np.all(getattr(less, quantity) <= getattr(much, quantity) * (1 + 1e-12))


@given(sizes_of, cuts_of, chips, st.floats(0.1, 1), st.data())
def test_a_slower_chip_is_never_faster(sizes, cuts, on, part, data):
    names = ["flops_per_second.bfloat16", "hbm_bytes_per_second", "matmul_efficiency", "hbm_efficiency"]
    name = data.draw(st.sampled_from(names))
    slower = on.override({name: on.constants[name].value * part}, "a test")
    assert np.all(priced(sizes, cuts, on).seconds <= priced(sizes, cuts, slower).seconds * (1 + 1e-12))


@given(sizes_of, cuts_of, chips, st.floats(0, 1e-3))
def test_overhead_is_added_to_every_product(sizes, cuts, on, overhead):
    free, paid = (replace(on, op_overhead_seconds=each) for each in (0.0, overhead))
    np.testing.assert_allclose(priced(sizes, cuts, paid).seconds, priced(sizes, cuts, free).seconds + overhead)


@given(sizes_of, cuts_of, chips)
def test_padding_adds_work_and_whole_tiles_need_none(sizes, cuts, on):
    op, rows = matmul(sizes).operations[0], np.array(cuts, dtype=float)
    asked, done = evaluate(flops(op), op, rows), evaluate(padded_flops(op), op, rows, on.matrix_tile)
    assert np.all(asked <= done * (1 + 1e-12))
    tiled = matmul({letter: int(4 * on.matrix_tile) for letter in LETTERS}).operations[0]
    np.testing.assert_allclose(
        evaluate(padded_flops(tiled), tiled, rows, on.matrix_tile), evaluate(flops(tiled), tiled, rows)
    )


@given(sizes_of, cuts_of, chips)
def test_either_operand_may_stream(sizes, cuts, on):
    turned = {**sizes, "m": sizes["n"], "n": sizes["m"]}
    swapped = [(b, n, m, k) for b, m, n, k in cuts]
    np.testing.assert_allclose(
        priced(sizes, cuts, on).compute_seconds, priced(turned, swapped, on).compute_seconds, rtol=1e-12
    )


# What stays on the chip


def two_products(m: int, k: int, h: int, n: int, *, returned: bool) -> Program:
    """`(x @ a) @ b`, bfloat16, whose inner result is 2mh bytes; a result of the program too if it is `returned`."""
    shapes = ((m, k), (k, h), (m, h), (h, n), (m, n))
    values = tuple(Value(f"v{i}", shape, "bfloat16", 2.0) for i, shape in enumerate(shapes))

    def end(value: int, primitive: str) -> Operation:
        use = (Use(value, ((0,), (1,))),)
        factors = tuple(Factor(size) for size in shapes[value])
        if primitive == "argument":
            return Operation(primitive, primitive, factors, (), use, op_class="source")
        return Operation(primitive, primitive, factors, use, (), op_class="sink")

    def product(left: int, right: int, out: int) -> Operation:
        (rows, summed), columns = shapes[left], shapes[right][1]
        uses = Use(left, ((0,), (2,))), Use(right, ((2,), (1,)))
        factors = (Factor(rows), Factor(columns), Factor(summed, "sum"))
        results = (Use(out, ((0,), (1,))),)
        traffic = (0, 1, Output())
        return Operation("product", "dot_general", factors, uses, results, 0, "matmul", (), traffic, 2.0)

    ends = [end(2, "result")] if returned else []
    operations = (*(end(i, "argument") for i in (0, 1, 3)), product(0, 1, 2), product(2, 3, 4), end(4, "result"), *ends)
    return Program("two products", values, operations)


dims = st.tuples(*[st.sampled_from((8, 64, 512))] * 4)


@given(dims, st.booleans(), st.sampled_from(CUTS), st.floats(0, 2**20))
def test_what_fits_on_the_chip_passes_through_no_hbm(sizes, returned, cut, kept):
    m, k, h, n = sizes
    program, on = two_products(*sizes, returned=returned), replace(chip("v4"), on_chip_bytes=kept)
    first, second = (
        price(program, program.operations[i], np.array([[cut, 1, 1]], dtype=float), on).bytes[0] for i in (3, 4)
    )
    inner = 2 * m * h / cut
    stays = kept > 0 and inner <= kept and not returned
    assert first == pytest.approx(2 * (m * k / cut + k * h) + (0 if stays else inner))
    assert second == pytest.approx(2 * (h * n + m * n / cut) + (0 if stays else inner))


@given(dims, st.floats(0, 2**20), st.floats(0, 2**20))
def test_a_larger_memory_on_the_chip_never_costs_more(sizes, one, other):
    program, rows = two_products(*sizes, returned=False), np.ones((1, 3))
    less, more = (
        price(program, program.operations[4], rows, replace(chip("v4"), on_chip_bytes=kept)).bytes[0]
        for kept in sorted((one, other))
    )
    assert more <= less


# What the TPU compiler's cycles say, microseconds on one v4 for [rows, 8192] x [8192, 8192] with the weights on the chip


@pytest.mark.parametrize(
    ("rows", "microseconds"), [(8, 35.18), (64, 44.94), (128, 72.18), (192, 105.46), (512, 271.01)]
)
def test_few_rows_take_as_long_as_the_compiler_says(rows: int, microseconds: float):
    v4 = chip("v4")
    found = priced({"b": 1, "m": rows, "n": 8192, "k": 8192}, [(1, 1, 1, 1)], v4)
    assert found.compute_seconds[0] * 1e6 == pytest.approx(microseconds, rel=0.3)
