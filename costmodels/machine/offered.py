"""Slices and nodes that can be rented: the shapes that vendors list.

| chip | shapes | source |
|---|---|---|
| v5e, v6e | 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16 | Cloud TPU docs, "TPU v5e" and "TPU v6e", configurations |
| v4 | 2x2x1, 2x2x2, 2x2x4, 2x4x4, and whole cubes: every side a multiple of 4, up to 4096 chips | Cloud TPU docs, "TPU v4" |
| v5p | the same, up to 6144 chips | Cloud TPU docs, "TPU v5p": the largest slice is 16x16x24 |
| GPUs | 1, 2, 4 or 8 of a node, or whole nodes of 8 (the last side) | NVIDIA DGX, HGX; AWS P4, P5, Google Cloud A2, A3 |

The sides of a slice are compared without those of 1 and in rising order.
"""

from __future__ import annotations

from math import prod

from costmodels.machine.chips import Chip
from costmodels.machine.interconnects import Switch, Torus
from costmodels.machine.topology import Topology

Sides = tuple[int, ...]

_FLAT: tuple[Sides, ...] = ((), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_PARTS_OF_A_CUBE: tuple[Sides, ...] = ((2, 2), (2, 2, 2), (2, 2, 4), (2, 4, 4))
_CUBE = 4
_MOST_CHIPS = {"v4": 4096, "v5p": 6144}
_FLAT_CHIPS = ("v5e", "v6e")
_PART_OF_A_NODE = (1, 2, 4)


def is_offered(chip: Chip, shape: Sides) -> bool:
    """Whether a slice (or, for GPUs, nodes) of this shape is in a vendor's list; true for chips without a list.

    is_offered(chip("v5e"), (4, 4)), is_offered(chip("v5e"), (1, 8))       # True, False
    """
    sides = tuple(sorted(side for side in shape if side > 1))
    match chip.interconnect:
        case Switch() as switch:
            node, within = int(switch.chips_per_node), shape[-1] if shape else 1
            return within == node or prod(sides) in (*_PART_OF_A_NODE, node)
        case Torus() if chip.name in _FLAT_CHIPS:
            return sides in _FLAT
        case Torus() if chip.name in _MOST_CHIPS:
            cubes = len(sides) == 3 and all(side % _CUBE == 0 for side in sides)
            return sides in _PARTS_OF_A_CUBE or (cubes and prod(sides) <= _MOST_CHIPS[chip.name])
    return True


def not_offered(topology: Topology) -> str:
    """A sentence for a topology that no vendor lists; empty for one that some vendor does."""
    shape = tuple(axis.size for axis in topology.within_slice)
    if topology.chip.kind == "gpu":
        shape = topology.shape
    if is_offered(topology.chip, shape):
        return ""
    chips = f"{'x'.join(map(str, shape))} {topology.chip.name}"
    kind = f"nodes of {chips} GPUs" if topology.chip.kind == "gpu" else f"a slice of {chips} chips"
    return f"No vendor lists {kind} (costmodels.machine.offered): the plan holds, but there is no such machine to rent."
