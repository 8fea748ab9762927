"""Collectives of real programs on eight host devices, read back."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from autoshard.auditing.hlo_collectives import CompiledCollective, collectives
from tests.support.auditing.hlo_text import CUBE

# Real programs.

f32 = jnp.float32
ROWS, COLUMNS = 64, 32  # of what each chip holds: 8192 bytes


def compiled(body, *shapes) -> tuple[CompiledCollective, ...]:
    mesh = jax.make_mesh(tuple(CUBE.values()), tuple(CUBE), axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:8])
    mapped = jax.shard_map(body, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    arguments = [jax.ShapeDtypeStruct(shape, f32) for shape in shapes or [(ROWS, COLUMNS)]]
    return collectives(jax.jit(mapped).lower(*arguments).compile().as_text() or "", CUBE)


def written(kind: str, axes: tuple[str, ...]):
    """The collective as a program writes it, and the bytes that it should be read back with."""
    size = 2 ** len(axes)
    ring = [(i, (i + 1) % size) for i in range(size)]
    return {
        "all-gather": (lambda v: lax.all_gather(v, axes, axis=0, tiled=True), 8192 * size),
        "reduce-scatter": (lambda v: lax.psum_scatter(v, axes, scatter_dimension=1, tiled=True), 8192),
        "all-reduce": (lambda v: lax.psum(v, axes), 8192),
        "all-to-all": (lambda v: lax.all_to_all(v, axes, 0, 1, tiled=True), 8192),
        "collective-permute": (lambda v: lax.ppermute(v, tuple(sorted(axes)), ring), 8192),
    }[kind]


KINDS = ["all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute"]
AXES = [("x",), ("y",), ("z",), ("x", "y"), ("y", "z"), ("x", "z"), ("z", "x"), ("x", "y", "z")]


@pytest.mark.parametrize("axes", AXES, ids="".join)
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_written_is_read_back(kind, axes):
    operation, size = written(kind, axes)
    (found,) = compiled(operation)
    assert (found.kind, found.axes, found.bytes, found.count) == (kind, tuple(sorted(axes)), size, 1)
    assert found.source.startswith("test_hlo_compiled.py:")
    assert found.dtype == "f32" and found.count_known


def scanned(operation, length: int):
    """`operation` in a scan, in a form that leaves the carry's shape alone."""

    def body(carry, _):
        result = operation(jnp.sin(carry))
        return carry + jnp.sum(result), None

    return lambda v: lax.scan(body, v, None, length=length)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_scans_multiply(kind):
    operation, size = written(kind, ("x", "z"))
    (once,) = compiled(scanned(operation, 5))
    assert (once.kind, once.axes, once.bytes, once.count) == (kind, ("x", "z"), size, 5)
    (nested,) = compiled(scanned(scanned(operation, 3), 5))
    assert (nested.kind, nested.bytes, nested.count, nested.count_known) == (kind, size, 15, True)


def test_arrays_reduced_together_are_combined_or_read_apart():
    found = compiled(lambda a, b: lax.psum((a, b), "y"), (ROWS, COLUMNS), (COLUMNS,))
    assert {(each.kind, each.axes) for each in found} == {("all-reduce", ("y",))}
    assert sum(each.bytes for each in found) == 8192 + COLUMNS * 4
    assert [each.spelling for each in found] in (["combined 2"], ["all-reduce"], ["all-reduce"] * 2)


def test_reductions_are_told_apart():
    assert [each.reduction for each in compiled(lambda v: lax.pmax(v, "x"))] == ["max"]
    assert [each.reduction for each in compiled(lambda v: lax.pmin(v, "x"))] == ["min"]
    assert [each.reduction for each in compiled(lambda v: lax.psum(v, "x"))] == ["add"]


def test_a_loop_of_unknown_length_is_counted_once_and_said():
    def body(v):
        return lax.while_loop(lambda s: s[0, 0] < 3, lambda s: lax.psum(s, "z"), v)

    (found,) = compiled(body)
    assert (found.count, found.count_known) == (1, False)


def test_a_program_without_collectives_has_none():
    assert compiled(lambda v: v * 2) == ()


def test_the_partitioner_gathers_what_it_cannot_reshard():
    """Shardy's full rematerialization: three axes leave the rows and two enter the columns in one step."""
    mesh = jax.make_mesh((2, 2, 2), tuple(CUBE), axis_types=(AxisType.Auto,) * 3)

    def move(x):
        x = lax.with_sharding_constraint(jnp.tanh(x), jax.NamedSharding(mesh, P(("x", "y", "z"), None)))
        return jnp.sin(lax.with_sharding_constraint(x, jax.NamedSharding(mesh, P(None, ("y", "z")))))

    text = jax.jit(move).lower(jax.ShapeDtypeStruct((64, 64), jnp.float32)).compile().as_text() or ""
    gathers = [each for each in collectives(text, CUBE) if each.kind == "all-gather"]
    assert any(each.only_sliced for each in gathers), [each.op_name for each in gathers]
