"""Emission choices that no rule decides, which the plan keeps."""

from __future__ import annotations

from dataclasses import dataclass

from autoshard._util.tables import size


@dataclass(frozen=True)
class Emission:
    """The emission choices of a plan.

    - `formats`: the origin of the orders of dimensions of arguments and results: "default", the device's own, with none in
      the plan; "rule", from an array's uses (`search.answer.orders`); "compiler", chosen by `Layout.AUTO`; "given".
    - `residual_barriers`: whether long residual sums on TPUs get barriers; None for a decision by the memory that they free
      (`autoshard.emitting.tpu_workarounds.residual_barriers`).
    - `score_barriers`: whether the projections of long attention scores on TPUs get barriers; None for a decision by their
      length (`autoshard.emitting.tpu_workarounds.score_barriers`).
    - `rings`: whether the rings of a plan are emitted; False for their collectives at once instead, None for rings
      (`autoshard.emitting.collectives.rings`).
    - `scoped_memory_kib`: the on-chip memory that one operation of a TPU program may use; None for the compiler's default
      (`autoshard.emitting.tpu_workarounds.scoped_memory`).
    """

    formats: str = "default"
    residual_barriers: bool | None = None
    score_barriers: bool | None = None
    scoped_memory_kib: int | None = None
    rings: bool | None = None

    def words(self) -> str:
        """The choices that differ from the default, as text; empty if none does."""
        found = [_FORMATS[self.formats]] if self.formats in _FORMATS else []
        for has_barriers, where in (
            (self.residual_barriers, "in residual sums"),
            (self.score_barriers, "before attention scores"),
        ):
            if has_barriers is not None:
                found.append(f"{'' if has_barriers else 'no '}barriers {where}")
        if self.rings is not None:
            found.append(f"{'' if self.rings else 'no '}rings beside matmuls")
        if self.scoped_memory_kib is not None:
            found.append(f"{size(self.scoped_memory_kib * 1024)} of on-chip memory for an operation")
        return ", ".join(found)


BY_DEFAULT = Emission()
"""The emission choices of plans that have not been compiled."""
_FORMATS = {"rule": "formats by rule", "compiler": "the compiler's formats", "given": "formats as given"}
