"""The choices of emission that no rule decides, kept in the plan: how its program is written for the compiler."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Emission:
    """How a plan is emitted.

    - `formats`: where the orders of dimensions of arguments and results are from: "default", the device's own, without any in
      the plan; "rule", by what reads an array (`search.answer.orders`); "compiler", chosen by `Layout.AUTO`; "given".
    - `residual_barriers`: whether long residual sums begin again at barriers, on TPUs
      (`autoshard.emitting.tpu_workarounds.residual_barriers`).
    """

    formats: str = "default"
    residual_barriers: bool = True

    def words(self) -> str:
        """The choices that are not by default, in words; empty where all are."""
        found = [_FORMATS[self.formats]] if self.formats in _FORMATS else []
        found += [] if self.residual_barriers else ["no barriers in residual sums"]
        return ", ".join(found)


BY_DEFAULT = Emission()
"""How plans are emitted that nobody has compiled."""
_FORMATS = {"rule": "formats by rule", "compiler": "the compiler's formats", "given": "formats as given"}
