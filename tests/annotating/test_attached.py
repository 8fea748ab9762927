"""Meshes of plans, and the topology of the devices at hand."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType

import autoshard
from autoshard.annotating.attached import name_of
from tests.support.plans import (
    planned_block,
)


def test_a_mesh_has_the_axes_of_the_plan() -> None:
    plan, _, _ = planned_block()
    mesh = plan.make_mesh()
    assert dict(mesh.shape) == {"x": 2, "y": 4} and mesh.axis_types == (AxisType.Auto, AxisType.Auto)
    assert list(mesh.devices.flat) == jax.devices()
    assert list(plan.make_mesh(jax.devices()[::-1]).devices.flat) == jax.devices()


def test_a_topology_may_be_a_file_or_the_devices_at_hand(tmp_path) -> None:
    file = tmp_path / "ours.toml"
    file.write_text('chip = "cpu"\nshape = [2, 2]\n[constants]\nhbm_bytes_per_second = 5e9\n')
    args = jnp.ones((8, 8)), jnp.ones((8, 8))
    for given in (file, str(file)):
        found = autoshard.search(jnp.dot, *args, topology=given).topology
        assert (found.name, found.shape, found.chip.hbm_bytes_per_second) == ("ours", (2, 2), 5e9)
    assert autoshard.search(jnp.dot, *args, topology="auto").topology.name == "cpu:8"


def devices(platform: str, kind: str, coordinates: Any = None, processes: Any = None) -> list[Any]:
    places = coordinates or [(0, 0, 0)] * len(processes)
    return [
        SimpleNamespace(platform=platform, device_kind=kind, coords=place, process_index=process, id=i)
        for i, (place, process) in enumerate(zip(places, processes or [0] * len(places), strict=True))
    ]


@pytest.mark.parametrize(
    "given, name",
    (
        (devices("cpu", "cpu", processes=[0] * 3), "cpu:3"),
        (devices("tpu", "TPU v4", list(product(range(2), range(2), range(4)))), "v4:2x2x4"),
        (devices("tpu", "TPU v4", list(product(range(2), range(2), range(1)))), "v4:2x2x1"),
        (devices("tpu", "TPU v5 lite", list(product(range(4), range(2), range(1)))), "v5e:4x2"),
        (devices("tpu", "TPU v5p", list(product(range(2), range(2), range(2)))), "v5p:2x2x2"),
        (devices("gpu", "NVIDIA H100 80GB HBM3", processes=[0] * 8 + [1] * 8), "h100:2x8"),
        (devices("gpu", "NVIDIA H200", processes=[0] * 4), "h200:4"),
        (devices("gpu", "NVIDIA A100-SXM4-80GB", processes=list(range(16))), "a100:2x8"),
        (devices("gpu", "NVIDIA B200", processes=[0, 1]), "b200:2"),
    ),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_auto_names_the_devices_at_hand(given: list[Any], name: str) -> None:
    assert name_of(given) == name


@pytest.mark.parametrize(
    "given, message",
    (
        (
            devices("gpu", "Radeon VII", processes=[0]),
            "JAX sees 1 devices of kind 'Radeon VII', which is not in the catalogue",
        ),
        (
            devices("gpu", "NVIDIA H100", processes=[0, 0, 1]),
            "JAX sees 3 GPUs, with different numbers per node",
        ),
        (
            devices("tpu", "TPU v4", [(0, 0, 0), (1, 1, 0)]),
            "JAX sees 2 v4 devices, which do not fill a box of 2x2x1 chips",
        ),
        (
            devices("cpu", "cpu", processes=[0]) + devices("gpu", "NVIDIA H100", processes=[0]),
            "JAX sees devices of several kinds",
        ),
    ),
    ids=("unknown", "uneven", "no box", "several"),
)
def test_devices_that_are_no_topology_are_refused(given: list[Any], message: str) -> None:
    with pytest.raises(autoshard.TopologyError, match=message):
        name_of(given)
