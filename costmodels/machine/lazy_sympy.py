"""SymPy, imported when it is first used.

Its import takes half a second, which `import autoshard` and a run of a plan from a file do not need:

    from costmodels.machine.lazy_sympy import sympy
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import sympy as sympy
else:

    class _Sympy:
        """The module, attribute by attribute."""

        def __getattr__(self, name: str) -> Any:
            import sympy as module

            return getattr(module, name)

    sympy = _Sympy()
