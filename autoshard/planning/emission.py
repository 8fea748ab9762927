"""The choices of emission that no rule decides, kept in the plan: how its program is written for the compiler."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Emission:
    """How a plan is emitted.

    - `formats`: where the orders of dimensions of arguments and results are from: "default", the device's own, without any in
      the plan; "compiler", chosen by `Layout.AUTO`; "given", by the user.
    - `residual_barriers`: whether long residual sums begin again at barriers, on TPUs
      (`autoshard.emitting.tpu_workarounds.residual_barriers`).
    """

    formats: str = "default"
    residual_barriers: bool = True

    def words(self) -> str:
        """What is not by default, in words; empty where all is."""
        found = [_FORMATS.get(self.formats, f"formats {self.formats}")] if self.formats != "default" else []
        found += [] if self.residual_barriers else ["no barriers in residual sums"]
        return ", ".join(found)


BY_DEFAULT = Emission()
"""How plans are emitted that nobody has compiled."""
_FORMATS = {"compiler": "the compiler's formats", "given": "formats as given"}
