"""The fingerprint of a program: what it computes, what it costs, and where its layouts are pinned."""

from __future__ import annotations

import hashlib

from costmodels.program.program import Program


def fingerprint(program: Program) -> str:
    """A hash of what the program computes and costs: operations, factors, shapes, types; free of names and JAX's spelling."""
    digest = hashlib.sha256()
    for value in program.values:
        digest.update(repr((value.shape, value.dtype, value.region)).encode())
    for op in program.operations:
        costs = (op.op_class, [sorted(group) for group in op.linear], op.traffic, op.flops_per_point, op.dtype)
        digest.update(repr((op.primitive, op.factors, op.inputs, op.outputs, op.region, costs)).encode())
        if op.pinned is not None:
            digest.update(repr(op.pinned).encode())
    regions = [
        (region.kind, region.parent, region.count) for region in program.regions
    ]  # names have the line they stand at
    digest.update(repr((regions, program.results, program.donated)).encode())
    return digest.hexdigest()
