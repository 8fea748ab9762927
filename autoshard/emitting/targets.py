"""The devices that a program is compiled for: real ones, host devices, or TPUs that are only described.

The `libtpu` wheel holds the whole TPU compiler, which compiles for a slice that this machine does not have; see
`jax.experimental.topologies`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from autoshard.emitting.gpu_targets import ARCHITECTURES, target_config
from autoshard.errors import AutoshardError
from costmodels.machine.topology import Topology

Target = Literal["host", "tpu", "gpu"]
"""Whose compiler compiles: that of this machine's CPU, of TPUs or of GPUs, neither of which need be there."""

# The chips that libtpu compiles for: how many sizes their topologies have, and what to ask of the compiler. v4 counts
# its two cores as two devices unless it is told that they work as one ("megacore").
_TPU_CHIPS: dict[str, tuple[int, dict[str, Any]]] = {
    "v4": (3, {"chip_config_name": "megacore"}),
    "v5p": (3, {}),
    "v5e": (2, {}),
    "v6e": (2, {}),
}

# Without TPUs, libtpu must not ask the cloud's metadata server what machine this is (it would wait for an answer), and
# must not take the lock that keeps a second process from using the same chips (it would abort that process). The
# host's name and type it would otherwise complain of on stderr; what it compiles does not depend on them.
_DESCRIBED_ONLY = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v4-8",
    "TPU_LOG_DIR": "disabled",  # nor leave its log files behind
}
_CUDA_PLUGINS = (13, 12)
_TPU_DEVICE_FILES = ("/dev/accel0", "/dev/vfio/0")

_MOST_HOST_DEVICES = 4096  # each takes threads and memory, and a plan file may ask for any number


class TargetError(AutoshardError, RuntimeError):
    """The devices to compile for cannot be had; says why, and what to do."""


def devices_of(topology: Topology, target: Target) -> list[Any]:
    """The devices to compile for: host devices, or the plan's own chips, which need not be there.

    **Raises:** `AutoshardError` when the target cannot be had.
    """
    if target == "host":
        return host_devices(topology.size)
    if target == "gpu":
        return gpu_devices(topology)
    if topology.slices > 1:
        raise AutoshardError(
            f"{topology.name} has {topology.slices} slices, which are planned but not compiled for ahead of time: audit on"
            ' "host", or a plan for one slice.'
        )
    return tpu_devices(topology.name, topology.shape, topology.chip.name)


def tpu_devices(topology_name: str, shape: Sequence[int], chip: str) -> list[Any]:
    """The devices of a TPU slice, to compile for ahead of time; no TPU is needed.

        tpu_devices("v4:4x4x4", (4, 4, 4), "v4")          # 64 devices with `.coords`

    **Arguments:**

    - `topology_name`: the slice as the user wrote it, for messages.
    - `shape`: chips along each torus axis; trailing axes of one chip may be left out.
    - `chip`: its name in the chip catalogue, one of v4, v5e, v5p, v6e.

    **Raises:** `TargetError` when libtpu is not installed, or its compiler does not know the slice.
    """
    slice_name, options = described_as(topology_name, shape, chip)
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise TargetError(
            f"{topology_name}: compiling for TPUs needs their compiler, libtpu, which is not installed. "
            f'Install the release that this JAX pins: pip install "jax[tpu]=={jax.__version__}"'
        )
    _quiet_without_tpu()
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=slice_name, **options)
    except Exception as error:
        raise TargetError(f"{topology_name}: the TPU compiler does not know this slice. It says: {error}") from error
    return list(described.devices)


def gpu_devices(topology: Topology) -> list[Any]:
    """The devices of a GPU topology, to compile for ahead of time; no GPU is needed.

        gpu_devices(parse_topology("h100:4x8"))          # 32 devices, eight to a process

    **Raises:** `TargetError` when XLA:GPU is not installed beside this JAX, or the chip is not known to be compiled for.
    """
    chip = topology.chip
    if chip.name not in ARCHITECTURES:
        raise TargetError(
            f"{topology.name}: the GPU compiler is asked for {', '.join(ARCHITECTURES)}; {chip.name!r} is none of these."
        )
    if not has_cuda():
        raise TargetError(
            f"{topology.name}: compiling for GPUs needs XLA:GPU, which is not installed in this environment. Install it:"
            f' pip install "autoshard[gpu]", or "jax[cuda13]=={jax.__version__}"'
        )
    *outer, per_node = topology.shape
    _quiet_without_tpu()
    try:
        described = topologies.get_topology_desc(
            platform="cuda",
            topology_name=topology.name.replace(":", "_"),
            target_config=target_config(chip),
            topology=f"1x{math.prod(outer)}x{per_node}",
        )
    except Exception as error:
        raise TargetError(f"{topology.name}: the GPU compiler refuses this topology. It says: {error}") from error
    return list(described.devices)


def has_cuda() -> bool:
    """Whether XLA:GPU is installed beside this JAX; that there is no GPU does not matter."""
    if importlib.util.find_spec("jax_plugins") is None:
        return False
    return any(importlib.util.find_spec(f"jax_plugins.xla_cuda{version}") for version in _CUDA_PLUGINS)


def described_as(topology_name: str, shape: Sequence[int], chip: str) -> tuple[str, dict[str, Any]]:
    """A slice as the TPU compiler is asked for it: its name, and the options of `topologies.get_topology_desc`.

    **Raises:** `TargetError` when the compiler does not know the chip, or its torus has not that many axes.
    """
    if chip not in _TPU_CHIPS:
        raise TargetError(
            f"{topology_name}: the TPU compiler is asked for {', '.join(_TPU_CHIPS)}; {chip!r} is none of these."
        )
    rank, options = _TPU_CHIPS[chip]
    sizes = _sizes(topology_name, shape, rank)
    hosts = [min(size, 2) for size in sizes[:2]] + [1]  # a host serves a 2×2 square, or what there is of it
    return f"{chip}:{'x'.join(map(str, sizes))}", {"chips_per_host_bounds": hosts, **options}


def _quiet_without_tpu() -> None:
    """Tells libtpu, which JAX loads wherever it is installed, not to look for a TPU on a machine that has none."""
    if not any(map(os.path.exists, _TPU_DEVICE_FILES)):
        for name, value in _DESCRIBED_ONLY.items():
            os.environ.setdefault(name, value)


def _sizes(topology_name: str, shape: Sequence[int], rank: int) -> list[int]:
    sizes = [*shape, *[1] * (rank - len(shape))]
    while len(sizes) > rank and sizes[-1] == 1:
        sizes.pop()
    if len(sizes) != rank or any(size < 1 for size in sizes):
        raise TargetError(
            f"{topology_name}: this chip's torus has {rank} axes of at least one chip each, got sizes {tuple(shape)}."
        )
    return sizes


def host_devices(count: int) -> list[Any]:
    """`count` CPU devices, of which JAX makes as many as it is told to before it starts.

    **Raises:** `TargetError` when JAX has already started with fewer.
    """
    if count > _MOST_HOST_DEVICES:
        raise TargetError(f"{count} host devices are more than one machine is asked for, {_MOST_HOST_DEVICES}.")
    flag = re.search(r"xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    configured = max(jax.config.jax_num_cpu_devices, int(flag[1]) if flag else 1)  # pyright: ignore[reportAttributeAccessIssue]
    # With several processes each has its own, and only the user knows how many.
    if configured < count and not jax.distributed.is_initialized():
        with contextlib.suppress(RuntimeError):  # JAX has started, and the number stands
            jax.config.update("jax_num_cpu_devices", count)
    _quiet_without_tpu()
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise TargetError(_too_few(count, len(devices)))
    taking_part = {device.process_index for device in devices[:count]}
    if len(taking_part) < jax.process_count():
        raise TargetError(
            f"The first {count} of {len(devices)} host devices are those of {len(taking_part)} of {jax.process_count()}"
            " processes; plan for all devices, or give each process fewer."
        )
    return devices[:count]


def _too_few(count: int, found: int) -> str:
    if jax.process_count() > 1:
        each = -(-count // jax.process_count())
        return (
            f"{count} host devices are needed and {jax.process_count()} processes have {found} together. Start each with "
            f"JAX_NUM_CPU_DEVICES={each}."
        )
    return (
        f"{count} host devices are needed and JAX has started with {found}. Start Python with "
        f"JAX_NUM_CPU_DEVICES={count} (or XLA_FLAGS=--xla_force_host_platform_device_count={count}), or call "
        f'jax.config.update("jax_num_cpu_devices", {count}) before anything else asks JAX for devices.'
    )


def mesh_of(devices: Sequence[Any], axis_sizes: Mapping[str, int]) -> Mesh:
    """A mesh whose axes lie along the axes of the torus, or along the devices' own order where there is none.

    TPU devices are placed by their coordinates: mesh axis $i$ is torus axis $i$. Where the sizes are the torus's in
    another order, each mesh axis takes a torus axis of its size; where they are not, coordinates are taken in
    row-major order, so that a mesh axis is a product of neighbouring torus axes. All others are placed by slice,
    process and number: the last mesh axes are the ones within a node.

    **Raises:** `TargetError` when there are not exactly as many devices as the mesh has places.
    """
    shape = tuple(axis_sizes.values())
    if math.prod(shape) != len(devices):
        wanted = " × ".join(f"{name}={size}" for name, size in axis_sizes.items())
        raise TargetError(f"A mesh of {wanted} takes {math.prod(shape)} devices, got {len(devices)}.")
    placed = np.empty(len(devices), dtype=object)
    placed[:] = sorted(devices, key=_place)
    torus = _torus(devices)
    if math.prod(torus) == len(devices) and (order := _matching(torus, shape)):
        placed = placed.reshape(torus).transpose(order)
    return Mesh(placed.reshape(shape), tuple(axis_sizes), axis_types=(AxisType.Auto,) * len(shape))


def _coordinates(device: Any) -> tuple[int, ...] | None:
    """Where a device stands in its torus; only TPUs stand in one, though GPUs have `.coords` too."""
    return tuple(device.coords) if device.platform == "tpu" and getattr(device, "coords", None) is not None else None


def _place(device: Any) -> tuple[Any, ...]:
    within = _coordinates(device) or (device.process_index,)
    return (getattr(device, "slice_index", 0) or 0, *within, getattr(device, "core_on_chip", 0) or 0, device.id)


def _torus(devices: Sequence[Any]) -> tuple[int, ...]:
    """The sizes of the box that the devices fill, (0,) where they have no coordinates."""
    coordinates = [_coordinates(device) for device in devices]
    if None in coordinates:
        return (0,)
    return tuple(len(set(along)) for along in zip(*coordinates, strict=True))


def _matching(torus: Sequence[int], shape: Sequence[int]) -> tuple[int, ...] | None:
    """The order of torus axes in which their sizes are the mesh's, axes of one device aside; unchanged if it can."""
    wanted = [size for size in shape if size > 1]
    orders = itertools.permutations(range(len(torus)))
    return next((order for order in orders if [torus[i] for i in order if torus[i] > 1] == wanted), None)
