"""The devices that a program is compiled for: attached ones, host devices, or TPUs and GPUs that are only described.

The `libtpu` wheel contains the whole TPU compiler, which can compile for a slice that this machine does not have; see
`jax.experimental.topologies`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any, Literal

import jax
from jax.experimental import topologies

from autoshard.emitting.targets.device_mesh import TargetError
from autoshard.emitting.targets.gpu_descriptions import ARCHITECTURES, target_config
from autoshard.errors import AutoshardError
from costmodels.machine.topology import Topology

Target = Literal["host", "tpu", "gpu"]
"""The compiler: for this machine's CPU, for TPUs or for GPUs; TPUs and GPUs need not be attached."""
COMPILERS: dict[str, Target] = {"cpu": "host", "tpu": "tpu", "gpu": "gpu"}
"""The compiler of a kind of chip."""

# The chips that libtpu compiles for: the rank of their topologies, and options for the compiler. The two cores of a v4
# count as two devices without the "megacore" option.
_TPU_CHIPS: dict[str, tuple[int, dict[str, Any]]] = {
    "v4": (3, {"chip_config_name": "megacore"}),
    "v5p": (3, {}),
    "v5e": (2, {}),
    "v6e": (2, {}),
}

# Without TPUs, libtpu must not query the cloud's metadata server for the type of machine, because it blocks until an
# answer comes. It must not take the lock on the chips either, because a second process then aborts. Without the host's
# name and type it complains on stderr; compiled programs do not depend on them.
_DESCRIBED_ONLY = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v4-8",
    "TPU_LOG_DIR": "disabled",  # no log files
}
_CUDA_PLUGINS = (13, 12)
_TPU_DEVICE_FILES = ("/dev/accel0", "/dev/vfio/0")

_MOST_HOST_DEVICES = 4096  # each takes threads and memory, and a plan file may have any number


def devices_of(topology: Topology, target: Target) -> list[Any]:
    """The devices to compile for: host devices, or the plan's own chips, which need not be attached.

    **Raises:** `AutoshardError` if the target is not available.
    """
    if target == "host":
        return host_devices(topology.size)
    if target == "gpu":
        return gpu_devices(topology)
    if topology.slices > 1:
        raise AutoshardError(
            f"{topology.name} has {topology.slices} slices; ahead-of-time compilation supports one. Audit on"
            ' "host", or audit a plan for one slice.'
        )
    return tpu_devices(topology.name, topology.shape, topology.chip.name)


def tpu_devices(topology_name: str, shape: Sequence[int], chip: str) -> list[Any]:
    """The devices of a TPU slice, to compile for ahead of time; no TPU is needed.

        tpu_devices("v4:4x4x4", (4, 4, 4), "v4")          # 64 devices with `.coords`

    **Arguments:**

    - `topology_name`: the slice as the user wrote it, for messages.
    - `shape`: chips along each torus axis; trailing axes of one chip may be left out.
    - `chip`: its name in the chip catalogue, one of v4, v5e, v5p, v6e.

    **Raises:** `TargetError` if libtpu is not installed, or its compiler does not support the slice.
    """
    slice_name, options = describe_target(topology_name, shape, chip)
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise TargetError(
            f"{topology_name}: compiling for TPUs needs libtpu, which is not installed. "
            f'Install the release that this JAX pins: pip install "jax[tpu]=={jax.__version__}"'
        )
    quiet_without_tpu()
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=slice_name, **options)
    except Exception as error:
        raise TargetError(f"{topology_name}: the TPU compiler does not support this slice. It says: {error}") from error
    return list(described.devices)


def gpu_devices(topology: Topology) -> list[Any]:
    """The devices of a GPU topology, to compile for ahead of time; no GPU is needed.

        gpu_devices(parse_topology("h100:4x8"))          # 32 devices, eight per process

    **Raises:** `TargetError` if XLA:GPU is not installed for this JAX, or the chip is not in `ARCHITECTURES`.
    """
    chip = topology.chip
    if chip.name not in ARCHITECTURES:
        raise TargetError(
            f"{topology.name}: the chip must be one of {', '.join(ARCHITECTURES)} for the GPU compiler, got {chip.name!r}."
        )
    if not has_cuda():
        raise TargetError(
            f"{topology.name}: compiling for GPUs needs XLA:GPU, which is not installed in this environment. Install it:"
            f' pip install "autoshard[gpu]", or "jax[cuda13]=={jax.__version__}"'
        )
    *outer, per_node = topology.shape
    quiet_without_tpu()
    try:
        described = topologies.get_topology_desc(
            platform="cuda",
            topology_name=topology.name.replace(":", "_"),
            target_config=target_config(chip),
            topology=f"1x{math.prod(outer)}x{per_node}",
        )
    except Exception as error:
        raise TargetError(f"{topology.name}: the GPU compiler rejects this topology. It says: {error}") from error
    return list(described.devices)


def has_cuda() -> bool:
    """Whether XLA:GPU is installed for this JAX; no GPU need be attached."""
    if importlib.util.find_spec("jax_plugins") is None:
        return False
    return any(importlib.util.find_spec(f"jax_plugins.xla_cuda{version}") for version in _CUDA_PLUGINS)


def describe_target(topology_name: str, shape: Sequence[int], chip: str) -> tuple[str, dict[str, Any]]:
    """A slice for the TPU compiler: its name, and the options of `topologies.get_topology_desc`.

    **Raises:** `TargetError` if the compiler does not support the chip, or its torus has another number of axes.
    """
    if chip not in _TPU_CHIPS:
        raise TargetError(
            f"{topology_name}: the chip must be one of {', '.join(_TPU_CHIPS)} for the TPU compiler, got {chip!r}."
        )
    rank, options = _TPU_CHIPS[chip]
    sizes = _sizes(topology_name, shape, rank)
    hosts = [min(size, 2) for size in sizes[:2]] + [1]  # a host has a 2×2 square, or a part of it at the edge
    return f"{chip}:{'x'.join(map(str, sizes))}", {"chips_per_host_bounds": hosts, **options}


def quiet_without_tpu() -> None:
    """Keeps libtpu, which JAX loads if it is installed, from looking for a TPU on a machine without one."""
    if not any(map(os.path.exists, _TPU_DEVICE_FILES)):
        for name, value in _DESCRIBED_ONLY.items():
            os.environ.setdefault(name, value)


def _sizes(topology_name: str, shape: Sequence[int], rank: int) -> list[int]:
    sizes = [*shape, *[1] * (rank - len(shape))]
    while len(sizes) > rank and sizes[-1] == 1:
        sizes.pop()
    if len(sizes) != rank or any(size < 1 for size in sizes):
        raise TargetError(
            f"{topology_name}: the shape must have {rank} axes of at least one chip each, got {tuple(shape)}."
        )
    return sizes


def host_devices(count: int) -> list[Any]:
    """`count` CPU devices; JAX makes them if it has not started yet.

    **Raises:** `TargetError` if JAX has already started with fewer.
    """
    if count > _MOST_HOST_DEVICES:
        raise TargetError(f"The number of host devices must be at most {_MOST_HOST_DEVICES}, got {count}.")
    flag = re.search(r"xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    configured = max(jax.config.jax_num_cpu_devices, int(flag[1]) if flag else 1)  # pyright: ignore[reportAttributeAccessIssue]
    # Several processes have their own devices each, and only the user knows how many.
    if configured < count and not jax.distributed.is_initialized():
        with contextlib.suppress(RuntimeError):  # JAX has started, and the number is fixed
            jax.config.update("jax_num_cpu_devices", count)
    quiet_without_tpu()
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise TargetError(_too_few_message(count, len(devices)))
    taking_part = {device.process_index for device in devices[:count]}
    if len(taking_part) < jax.process_count():
        raise TargetError(
            f"The first {count} of {len(devices)} host devices belong to {len(taking_part)} of {jax.process_count()}"
            " processes; plan for all devices, or give each process fewer."
        )
    return devices[:count]


def _too_few_message(count: int, found: int) -> str:
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
