"""The fingerprint of a program: a hash of its computation, its costs and its pins."""

from __future__ import annotations

import hashlib

from costmodels.program.program import Program


def fingerprint(program: Program) -> str:
    """A hash of operations, factors, shapes and types. It does not depend on names or on JAX's spelling."""
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
    ]  # names contain their source line
    digest.update(repr((regions, program.results, program.donated)).encode())
    return digest.hexdigest()
