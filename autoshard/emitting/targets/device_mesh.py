"""The order of devices in a mesh: mesh axes along the axes of the torus."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import AxisType, Mesh

from autoshard.errors import AutoshardError


class TargetError(AutoshardError, RuntimeError):
    """The devices to compile for are not available; the message has the reason and a remedy."""


def mesh_of(devices: Sequence[Any], axis_sizes: Mapping[str, int]) -> Mesh:
    """A mesh whose axes follow the axes of the torus, or the devices' own order if there is no torus.

    TPU devices are placed by their coordinates: mesh axis $i$ is torus axis $i$. If the sizes are a permutation of the
    torus's, each mesh axis takes a torus axis of its size. Otherwise coordinates are taken in row-major order, so a mesh
    axis is a product of neighbouring torus axes. All other devices are placed by slice, process and number: the last
    mesh axes are within a node.

    **Raises:** `TargetError` if the number of devices differs from the size of the mesh.
    """
    shape = tuple(axis_sizes.values())
    if math.prod(shape) != len(devices):
        wanted = " × ".join(f"{name}={size}" for name, size in axis_sizes.items())
        raise TargetError(f"A mesh of {wanted} takes {math.prod(shape)} devices, got {len(devices)}.")
    placed = np.empty(len(devices), dtype=object)
    placed[:] = sorted(devices, key=_place)
    torus = _torus(devices)
    if math.prod(torus) == len(devices) and (order := _match_shape(torus, shape)):
        placed = placed.reshape(torus).transpose(order)
    return Mesh(placed.reshape(shape), tuple(axis_sizes), axis_types=(AxisType.Auto,) * len(shape))


def _coordinates(device: Any) -> tuple[int, ...] | None:
    """The torus coordinates of a TPU; `None` for other devices, though GPUs have `.coords` too."""
    return tuple(device.coords) if device.platform == "tpu" and getattr(device, "coords", None) is not None else None


def _place(device: Any) -> tuple[Any, ...]:
    within = _coordinates(device) or (device.process_index,)
    return (getattr(device, "slice_index", 0) or 0, *within, getattr(device, "core_on_chip", 0) or 0, device.id)


def _torus(devices: Sequence[Any]) -> tuple[int, ...]:
    """The sizes of the box that the devices fill; (0,) if they have no coordinates."""
    coordinates = [_coordinates(device) for device in devices]
    if None in coordinates:
        return (0,)
    return tuple(len(set(along)) for along in zip(*coordinates, strict=True))


def _match_shape(torus: Sequence[int], shape: Sequence[int]) -> tuple[int, ...] | None:
    """The order of torus axes in which their sizes match the mesh's, ignoring axes of size 1; the identity if possible."""
    wanted = [size for size in shape if size > 1]
    orders = itertools.permutations(range(len(torus)))
    return next((order for order in orders if [torus[i] for i in order if torus[i] > 1] == wanted), None)
