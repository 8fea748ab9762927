"""The topology that a user gives: a string, a TOML file, a `Topology`, or the devices that JAX sees."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import jax

from autoshard.errors import TopologyError
from costmodels.machine.chips import ChipFormatError, UnknownChipError, catalogue, chip
from costmodels.machine.interconnects import Switch, Torus
from costmodels.machine.topology import Topology, TopologyFormatError, parse_topology

# Catalogue names of the chips by JAX's `device.device_kind`.
_TPU_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}


def topology_of(given: str | PathLike[str] | Topology) -> Topology:
    """The topology of a string, a path, a `Topology` or "auto".

    **Raises:** `TopologyError`.
    """
    if isinstance(given, Topology):
        return given
    try:
        if given == "auto":
            return parse_topology(name_of(jax.devices()))
        return parse_topology(given if isinstance(given, str) else Path(given))
    except (TopologyFormatError, UnknownChipError, ChipFormatError) as error:
        raise TopologyError(str(error)) from error


def topology_of_mesh(mesh: Any) -> Topology:
    """The topology of a mesh's devices; on host devices, which have no links, in the shape of the mesh.

    **Raises:** `TopologyError`.
    """
    devices = list(mesh.devices.flat)
    if devices[0].platform != "cpu":
        return topology_of(name_of(devices))
    sizes = [n for n in mesh.shape.values() if n > 1] or [1]
    return topology_of(f"cpu:{'x'.join(map(str, sizes))}")


def name_of(devices: Sequence[Any]) -> str:
    """The topology string of real devices, such as `v5e:4x4`; "auto" means that of all devices.

    **Raises:** `TopologyError` for devices whose chip is not in the catalogue, or that do not fill a box of a torus.
    """
    kinds = Counter((device.platform, device.device_kind) for device in devices)
    if len(kinds) != 1:
        listed = ", ".join(f"{count} {kind}" for (_, kind), count in kinds.items())
        raise TopologyError(f"JAX sees devices of several kinds ({listed}); name the topology, such as v5e:4x4.")
    platform, kind = next(iter(kinds))
    if platform == "cpu":
        return f"cpu:{len(devices)}"
    found = _TPU_KINDS.get(kind) if platform == "tpu" else _gpu(kind)
    if found is None:
        raise TopologyError(
            f"JAX sees {len(devices)} devices of kind {kind!r}, which is not in the catalogue ({', '.join(catalogue())});"
            " describe the devices in a TOML file and pass its path."
        )
    sizes = _torus(found, devices) if platform == "tpu" else _nodes(found, devices)
    return f"{found}:{'x'.join(map(str, sizes))}"


def _gpu(kind: str) -> str | None:
    """The catalogue's GPU whose name is a word of the kind: "NVIDIA H100 80GB HBM3" is h100."""
    words = kind.lower().replace("-", " ").split()
    return next((name for name, known in catalogue().items() if known.kind == "gpu" and name in words), None)


def _torus(name: str, devices: Sequence[Any]) -> list[int]:
    """The sizes of the box that the chips fill, without trailing axes of size 1."""
    sizes = [len(set(along)) for along in zip(*(device.coords for device in devices), strict=True)]
    product = 1
    for size in sizes:
        product *= size
    if product != len(devices):
        raise TopologyError(
            f"JAX sees {len(devices)} {name} devices, which do not fill a box of {'x'.join(map(str, sizes))} chips (several"
            " slices, or two devices per chip?); name the topology."
        )
    torus = chip(name).interconnect
    while isinstance(torus, Torus) and len(sizes) > torus.axes and sizes[-1] == 1:
        sizes.pop()
    return sizes


def _nodes(name: str, devices: Sequence[Any]) -> list[int]:
    """Nodes × GPUs per node, if each process has one node, or one GPU of a full node."""
    per_process = Counter(device.process_index for device in devices)
    per_node = max(per_process.values())
    switch = chip(name).interconnect
    if per_node == 1 and isinstance(switch, Switch):
        per_node = min(len(devices), int(switch.chips_per_node))
    if len(devices) % per_node or (max(per_process.values()) > 1 and len(set(per_process.values())) > 1):
        raise TopologyError(f"JAX sees {len(devices)} GPUs, with different numbers per node; name the topology.")
    nodes = len(devices) // per_node
    return [per_node] if nodes == 1 else [nodes, per_node]
