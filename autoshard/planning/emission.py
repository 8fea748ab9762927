"""Emission choices that no rule decides, which the plan keeps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Emission:
    """The emission choices of a plan.

    - `formats`: the origin of the orders of dimensions of arguments and results: "default", the device's own, with none in
      the plan; "rule", from an array's uses (`search.answer.orders`); "compiler", chosen by `Layout.AUTO`; "given".
    - `residual_barriers`: whether long residual sums on TPUs get barriers; None for a decision by the memory that they free
      (`autoshard.emitting.tpu_workarounds.residual_barriers`).
    """

    formats: str = "default"
    residual_barriers: bool | None = None

    def words(self) -> str:
        """The choices that differ from the default, as text; empty if none does."""
        found = [_FORMATS[self.formats]] if self.formats in _FORMATS else []
        if self.residual_barriers is not None:
            found.append(f"{'' if self.residual_barriers else 'no '}barriers in residual sums")
        return ", ".join(found)


BY_DEFAULT = Emission()
"""The emission choices of plans that have not been compiled."""
_FORMATS = {"rule": "formats by rule", "compiler": "the compiler's formats", "given": "formats as given"}
