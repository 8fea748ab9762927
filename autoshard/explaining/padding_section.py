"""The sections of `explain` on dimensions that do not divide: what padding costs, and donated arrays in several copies."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from autoshard._util.tables import percent, size, table, time, wrap_text
from autoshard.explaining.layer_groups import group_arrays
from autoshard.planning.padding_costs import padding_cost
from autoshard.planning.records import ArrayPlan, PlanRecord


def padding_section(plan: PlanRecord, width: int) -> Iterator[str]:
    """Each padded dimension with the bytes and FLOPs that it adds, the masks, and what a call with unpadded arrays takes."""
    if not plan.padding or plan.program is None:
        return
    cost = padding_cost(plan)
    done = sum(op.flops for op in plan.operations if op.matmul)
    rows = [
        (each.name, f"{each.size} to {each.padded}", f"{each.arguments}", size(each.bytes), _share(each.flops, done))
        for each in cost.dimensions
    ]
    yield "Padding"
    headers = ("dimension of", "size", "arguments", "added per chip", "of the matmuls' FLOPs")
    yield from (f"  {line}" for line in table(headers, rows, "/<>>>", width - 2))
    text = f"  masks: {cost.masks}, {time(cost.mask_seconds)} of the step"
    text += f"; a call pads unpadded arguments in {time(cost.call_seconds)} or more (plan.place pads once)"
    text += f", and cuts its results in {time(cost.cut_seconds)} or more" if cost.cut_seconds else ""
    yield from wrap_text(text, width, 4)


def _share(part: float, whole: float) -> str:
    return percent(part / whole if whole else 0.0)


def copies_section(plan: PlanRecord, width: int) -> Iterator[str]:
    """The donated arguments, such as a cache, that several chips hold copies of, with their memory."""
    found = [
        (array, copied)
        for array, _ in group_arrays(array for array in plan.arguments if array.donated)
        if (copied := _copied_over(plan, array)) and array.bytes_per_chip >= _SHOWN * plan.estimate.peak_bytes
    ]
    for array, axes in found:
        times = prod(plan.topology.axis_sizes[axis] for axis in axes)
        least = size(array.bytes_per_chip / times)
        yield from wrap_text(
            f"{array.path} is replicated {times}x over {''.join(axes)}: {size(array.bytes_per_chip)} per chip, where one copy"
            f" would take {least}",
            width,
            2,
        )


_SHOWN = 0.01
"""The share of the peak memory below which a replicated array is not listed."""


def _copied_over(plan: PlanRecord, array: ArrayPlan) -> tuple[str, ...]:
    """The mesh axes over which an array is replicated."""
    used = {axis for dim in array.layout.dims for axis in dim}
    return tuple(axis.name for axis in plan.topology.axes if axis.size > 1 and axis.name not in used)
