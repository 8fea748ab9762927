"""Devices to compile for, and what the TPU compiler makes of each collective for a v4 4×4×4."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from autoshard import AutoshardError, search
from autoshard.auditing.hlo_collectives import CompiledCollective, collectives, estimated_cycles
from autoshard.emitting import run_step
from autoshard.emitting.targets import TargetError, gpu_devices, has_cuda, host_devices, mesh_of, tpu_devices
from autoshard.emitting.targets.gpu_descriptions import ARCHITECTURES, target_config
from costmodels.machine import catalogue, parse_topology
from examples import palm
from search import Layout
from search.formulation.collective_steps import CollectiveStep, emittable
from tests.support.effort import mostly_long

TORUS = {"x": 4, "y": 4, "z": 4}


@dataclass(frozen=True)
class Chip:
    """A device as far as placement looks at it."""

    id: int
    coords: tuple[int, ...] | None = None
    platform: str = "tpu"
    process_index: int = 0
    slice_index: int = 0
    core_on_chip: int = 0


def box(*sizes: int) -> list[Chip]:
    """The chips of a torus, numbered as TPUs are: the first coordinate runs fastest."""
    count = math.prod(sizes)
    strides = [math.prod(sizes[:axis]) for axis in range(len(sizes))]
    return [
        Chip(i, tuple(i // stride % size for stride, size in zip(strides, sizes, strict=True))) for i in range(count)
    ]


def test_host_devices_are_as_many_as_asked_for():
    assert [device.platform for device in host_devices(4)] == ["cpu"] * 4


def test_more_host_devices_than_jax_started_with():
    jax.devices()
    with pytest.raises(TargetError) as error:
        host_devices(4096)
    assert isinstance(error.value, AutoshardError) and isinstance(error.value, RuntimeError)
    assert re.match(r"4096 host devices are needed and JAX has started with \d+\. Start Python with", str(error.value))
    assert "JAX_NUM_CPU_DEVICES=4096" in str(error.value)
    assert "XLA_FLAGS=--xla_force_host_platform_device_count=4096" in str(error.value)


@pytest.mark.parametrize("flags", ["", "--xla_force_host_platform_device_count=6"])
def test_host_devices_are_made_where_jax_has_not_started(flags):
    program = "import jax; from autoshard.emitting.targets import host_devices; host_devices(3); print(len(jax.devices('cpu')))"
    environment = {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**environment, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["6" if flags else "3"]


def test_mesh_axes_lie_along_torus_axes():
    mesh = mesh_of(box(4, 2, 3), {"x": 4, "y": 2, "z": 3})
    assert mesh.axis_names == ("x", "y", "z") and mesh.axis_types == (AxisType.Auto,) * 3
    assert all(mesh.devices[place].coords == place for place in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (3, 1, 2)])


def test_mesh_axes_of_other_sizes_take_the_torus_axis_that_fits():
    mesh = mesh_of(box(4, 8, 1), {"x": 8, "y": 4})
    assert [mesh.devices[place].coords for place in [(0, 0), (1, 0), (0, 1)]] == [(0, 0, 0), (0, 1, 0), (1, 0, 0)]


def test_a_mesh_axis_may_be_a_product_of_neighbouring_torus_axes():
    mesh = mesh_of(box(4, 4, 4), {"x": 4, "y": 16})
    assert [mesh.devices[0, i].coords for i in (0, 1, 4)] == [(0, 0, 0), (0, 0, 1), (0, 1, 0)]
    assert {device.coords[0] for device in mesh.devices[2]} == {2}


def test_a_part_of_a_torus_is_placed_in_order():
    mesh = mesh_of([chip for chip in box(4, 4, 1) if chip.id not in (5, 9)], {"x": 14})
    assert [chip.coords[:2] for chip in mesh.devices[:4]] == [(0, 0), (0, 1), (0, 2), (0, 3)]


def test_gpus_are_placed_by_node():
    gpus = [Chip(i, (0, i // 4, i % 4), "gpu", process_index=1 - i // 4) for i in range(8)]
    mesh = mesh_of(gpus[::-1], {"node": 2, "gpu": 4})
    assert [[gpu.id for gpu in node] for node in mesh.devices] == [[4, 5, 6, 7], [0, 1, 2, 3]]


def test_host_devices_keep_their_order():
    assert mesh_of(host_devices(8), {"x": 2, "y": 4}).devices.ravel().tolist() == jax.devices("cpu")[:8]


def test_a_mesh_takes_exactly_its_devices():
    with pytest.raises(TargetError, match=r"A mesh of x=4 × y=4 takes 16 devices, got 8\."):
        mesh_of(box(4, 2, 1), {"x": 4, "y": 4})


def test_a_chip_that_the_tpu_compiler_is_not_asked_for():
    with pytest.raises(
        TargetError, match=r"h100:8: the chip must be one of v4, v5p, v5e, v6e for the TPU compiler, got 'h100'"
    ):
        tpu_devices("h100:8", (8,), "h100")


def test_a_missing_libtpu_names_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(TargetError, match=rf'not installed\. .*pip install "jax\[tpu\]=={re.escape(jax.__version__)}"'):
        tpu_devices("v4:4x4x4", (4, 4, 4), "v4")


# Ahead of time, by the real TPU compiler.

SLICES = [
    ("v4:4x4x4", (4, 4, 4)),
    ("v4:4x4", (4, 4)),
    ("v4:2x2x1", (2, 2, 1)),
    ("v4:1", (1,)),
    ("v5p:2x2x4", (2, 2, 4)),
    ("v5e:4x4", (4, 4)),
    ("v5e:4x4x1", (4, 4, 1)),
    ("v5e:1x1", (1, 1)),
    ("v6e:4x8", (4, 8)),
]


@pytest.mark.tpu
@pytest.mark.parametrize(("name", "shape"), SLICES, ids=[name for name, _ in SLICES])
def test_described_tpus(name, shape):
    devices = tpu_devices(name, shape, name.split(":")[0])
    assert len(devices) == math.prod(shape)
    mesh = mesh_of(devices, {f"axis{i}": size for i, size in enumerate(shape)})
    last = mesh.devices.flat[-1]
    assert last.coords == [*(size - 1 for size in shape), 0, 0][:3]


@pytest.mark.tpu
def test_a_slice_that_the_tpu_compiler_does_not_know():
    with pytest.raises(TargetError, match=r"^v5e:3x5: the TPU compiler does not support this slice\. It says: .*3x5"):
        tpu_devices("v5e:3x5", (3, 5), "v5e")
    with pytest.raises(TargetError, match=r"^v5e:4x4x4: the shape must have 2 axes .*, got \(4, 4, 4\)"):
        tpu_devices("v5e:4x4x4", (4, 4, 4), "v5e")


@pytest.fixture(scope="module")
def torus() -> Mesh:
    return mesh_of(tpu_devices("v4:4x4x4", (4, 4, 4), "v4"), TORUS)


def compiled_text(body, mesh: Mesh, shape: tuple[int, ...], dtype=jnp.bfloat16) -> str:
    mapped = jax.shard_map(body, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    return jax.jit(mapped).lower(jax.ShapeDtypeStruct(shape, dtype)).compile().as_text() or ""


def written(kind: str, axes: tuple[str, ...], dimension: int = 0):
    """The collective as a program writes it, and its bytes for an operand of one byte."""
    size = math.prod(TORUS[axis] for axis in axes)
    ring = [(i, (i + 1) % size) for i in range(size)]
    return {
        "all-gather": (lambda v: lax.all_gather(v, axes, axis=dimension, tiled=True), size),
        "reduce-scatter": (lambda v: lax.psum_scatter(v, axes, scatter_dimension=dimension, tiled=True), 1),
        "all-reduce": (lambda v: lax.psum(v, axes), 1),
        "all-to-all": (lambda v: lax.all_to_all(v, axes, dimension, 1 - dimension, tiled=True), 1),
        "collective-permute": (lambda v: lax.ppermute(v, axes, ring), 1),
    }[kind]


@pytest.mark.tpu
@pytest.mark.parametrize("dtype", mostly_long([jnp.bfloat16, jnp.float32], jnp.bfloat16), ids=["bf16", "f32"])
@pytest.mark.parametrize(
    "axes", mostly_long([("x",), ("z",), ("y", "z"), ("x", "z"), ("x", "y", "z")], ("x",), ("x", "z")), ids="".join
)
@pytest.mark.parametrize("kind", ["all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute"])
def test_the_tpu_program_holds_what_was_written(torus, kind, axes, dtype):
    operation, factor = written(kind, axes, dimension=1)
    text = compiled_text(operation, torus, (64, 16384 if kind == "reduce-scatter" else 1024), dtype)
    (found,) = collectives(text, TORUS)
    if found.kind != kind:  # over all the chips of a slice, the compiler gathers and scatters by an all-reduce
        assert len(axes) == 3 and found.kind == "all-reduce"
        assert found.spelling == {"all-gather": "gather by all-reduce", "reduce-scatter": "scatter by all-reduce"}[kind]
    operand = 64 * (16384 if kind == "reduce-scatter" else 1024) * jnp.dtype(dtype).itemsize
    assert (found.axes, found.bytes, found.count) == (axes, operand * factor, 1)
    if found.spelling != "gather by all-reduce":  # which has lost its metadata
        assert found.source.startswith("test_targets.py:") and found.op_name


@pytest.mark.tpu
@pytest.mark.parametrize("steps", ["x,yz", "yz,x", "xy,z", "z,y,x"])
def test_over_all_chips_in_steps_stays_as_written(torus, steps):
    order = [tuple(step) for step in steps.split(",")]

    def gather(v):
        for axes in order:
            v = lax.all_gather(v, axes, axis=0, tiled=True)
        return v

    def scatter(v):
        for axes in order:
            v = lax.psum_scatter(v, axes, scatter_dimension=1, tiled=True)
        return v

    for operation, shape, kind in [(gather, (64, 2048), "all-gather"), (scatter, (64, 65536), "reduce-scatter")]:
        found = collectives(compiled_text(operation, torus, shape), TORUS)
        assert [(each.kind, each.axes) for each in found] == [(kind, tuple(sorted(axes))) for axes in order]


SCATTERS = [
    ((2048, 2048), 0, ("x",)),  # rows in large blocks: padded, then a permute of a few rows
    ((16384, 2048), 0, ("x", "y")),
    ((64, 512), 1, ("x",)),  # half a tile of bf16 for each chip
    ((64, 18432), 1, ("x", "y")),
    ((64, 512), 0, ("x", "y")),  # fewer rows than a tile for each chip
    ((16, 64, 256), 0, ("y", "z")),
    ((64, 2, 128), 0, ("x",)),  # few rows behind the dimension that is scattered
    ((4, 4096), 1, ("x",)),  # few rows before it
    ((512, 8, 32), 0, ("y",)),  # few lanes behind it: it becomes the lanes itself
    ((2048, 8, 8), 0, ("y",)),
]


def scattered(rank: int, dimension: int, axes: tuple[str, ...]) -> Layout:
    return Layout(tuple(axes if i == dimension else () for i in range(rank)))


@pytest.mark.tpu
@pytest.mark.parametrize(("shape", "dimension", "axes"), SCATTERS, ids=str)
def test_however_the_tpu_scatters_it_is_accounted_for(torus, shape, dimension, axes):
    operation, _ = written("reduce-scatter", axes, dimension)
    first, *others = collectives(compiled_text(operation, torus, shape), TORUS)
    assert first.kind in ("reduce-scatter", "all-reduce")
    assert (first.axes, first.bytes, first.reduction) == (axes, math.prod(shape) * 2, "add")
    step = CollectiveStep(
        "reduce-scatter", axes, Layout(((),) * len(shape), axes), scattered(len(shape), dimension, axes), -1, dimension
    )
    if emittable(step, shape, 2, parse_topology("v4:4x4x4")):
        assert first.kind == "reduce-scatter", "the search takes it for one"
    assert all(each.spelling == "reduce-scatter realignment" for each in others)
    assert sum(each.bytes for each in others) < 0.1 * first.bytes


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("shape", "dimension"), [((2, 64, 80, 1024), 1), ((2, 2, 64, 16, 256), 2), ((16, 64, 16, 512), 0)]
)
@pytest.mark.parametrize("axes", [("x",), ("x", "y")], ids="".join)
def test_dimensions_before_a_tile_are_scattered_as_planned(shape, dimension, axes):
    topology = parse_topology("v4:4x4x4")
    mesh = mesh_of(tpu_devices("v4:4x4x4", (4, 4, 4), "v4"), TORUS)
    none = ((),) * len(shape)
    step = CollectiveStep(
        "reduce-scatter", axes, Layout(none, axes), scattered(len(shape), dimension, axes), -1, dimension
    )
    assert emittable(step, shape, 2, topology)

    def products(v, w):
        return run_step(step, jnp.einsum("...k,kn->...n", v, w), TORUS)

    mapped = jax.shard_map(products, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    given = [jax.ShapeDtypeStruct(of, jnp.bfloat16) for of in ((*shape[:-1], 128), (128, shape[-1]))]
    found = collectives(jax.jit(mapped).lower(*given).compile().as_text() or "", TORUS)
    assert [(each.kind, each.axes, each.bytes) for each in found] == [("reduce-scatter", axes, 2 * math.prod(shape))]


@pytest.mark.long
@pytest.mark.tpu
def test_loops_multiply_what_the_tpu_program_holds(torus):
    def looped(length: int, inner: int):
        def step(carry, _):
            return jnp.tanh(lax.psum(carry, ("y", "z"))), None

        def outer(carry, _):
            carry = lax.psum_scatter(
                lax.all_gather(carry, "x", axis=1, tiled=True), "x", scatter_dimension=1, tiled=True
            )
            return lax.scan(step, carry, None, length=inner)[0], None

        return compiled_text(lambda v: lax.scan(outer, v, None, length=length)[0], torus, (512, 1024))

    found = collectives(looped(118, 3), TORUS)
    read = {each.kind: (each.axes, each.bytes, each.count, each.count_known) for each in found}
    assert read == {
        "all-gather": (("x",), 4 << 20, 118, True),
        "reduce-scatter": (("x",), 4 << 20, 118, True),
        "all-reduce": (("y", "z"), 1 << 20, 354, True),
    }
    cycles = [estimated_cycles(looped(length, 3)) for length in (10, 20, 30)]
    ten, twenty, thirty = (each or 0 for each in cycles)
    assert thirty - twenty == twenty - ten > 0


@pytest.mark.long
@pytest.mark.tpu
def test_gathers_spread_over_matmuls_are_counted_once():
    mesh = mesh_of(tpu_devices("v5e:4x4", (4, 4), "v5e"), {"x": 4, "y": 4})

    def body(x, up, across):
        def layer(carry, weights):
            up, across = weights
            gathered = lax.all_gather(up, "x", axis=0, tiled=True)
            other = jnp.tanh(carry @ across)
            return carry + other + (carry @ gathered)[:, :2048], None

        return lax.scan(layer, x, (up, across))[0]

    mapped = jax.shard_map(body, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    shapes = [(2048, 2048), (4, 512, 8192), (4, 2048, 2048)]
    text = (
        jax.jit(mapped).lower(*[jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]).compile().as_text()
        or ""
    )
    found: tuple[CompiledCollective, ...] = collectives(text, {"x": 4, "y": 4})
    assert {(each.kind, each.axes) for each in found} == {("all-gather", ("x",))}
    assert sum(each.bytes * each.count for each in found) == 4 * 2048 * 8192 * 2


@pytest.mark.long
@pytest.mark.tpu
def test_writing_a_token_does_not_copy_the_cache():
    """Rows that are sliced just before they are written have another memory layout than the cache; it must not take it."""
    workload = palm.decode(size="62b", batch=32, layers=2)
    plan = search(workload.fn, *workload.args, topology="v4:2x4x2", donate_argnums=workload.donate_argnums)
    mesh = mesh_of(tpu_devices("v4:2x4x2", (2, 4, 2), "v4"), plan.topology.axis_sizes)
    text = plan.jit(workload.fn, mesh).lower(*workload.args).compile().as_text()
    assert re.search(r"= bf16\[2,2,2048,256\]\{3,2,1,0\S* dynamic-update-slice\(", text)
    assert not re.search(r"= bf16\[2,2,2048,256\]\S* copy\(", text)


# --- GPUs that are only described


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_gpu_is_described_by_its_chip_and_its_architecture(name: str) -> None:
    chip = catalogue()[name]
    text = target_config(chip)
    assert text.count("{") == text.count("}") == 3
    fields = dict(re.findall(r"(\w+): ([\d.]+|\w+)", text))
    assert float(fields["device_memory_size"]) == chip.hbm_bytes
    assert float(fields["memory_bandwidth"]) == chip.hbm_bytes_per_second
    assert int(fields["shared_memory_per_block_optin"]) < int(fields["shared_memory_per_core"])
    assert ("ACCELERATED_FEATURES" in text) == (ARCHITECTURES[name].compute_capability >= (9, 0))


def test_gpus_that_cannot_be_described() -> None:
    with pytest.raises(
        TargetError, match="v4:2x2x2: the chip must be one of a100, h100, h200, b200 for the GPU compiler, got 'v4'"
    ):
        gpu_devices(parse_topology("v4:2x2x2"))


@pytest.mark.skipif(has_cuda(), reason="the GPU compiler is installed")
def test_a_gpu_compiler_that_is_not_installed_is_named() -> None:
    with pytest.raises(TargetError, match=r'h100:8: compiling for GPUs needs XLA:GPU.* pip install "autoshard\[gpu\]"'):
        gpu_devices(parse_topology("h100:8"))


@pytest.mark.skipif(not has_cuda(), reason="the GPU compiler is not installed")
def test_gpus_stand_in_their_nodes() -> None:
    topology = parse_topology("h100:4x8")
    mesh = mesh_of(gpu_devices(topology), topology.axis_sizes)
    assert mesh.devices.shape == (4, 8)
    assert [len({gpu.process_index for gpu in node}) for node in mesh.devices] == [1] * 4
