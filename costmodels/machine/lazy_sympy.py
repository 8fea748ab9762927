"""SymPy, imported when it is first used.

It takes half a second to import, which `import autoshard` and a run by a plan from a file need not wait for:

    from costmodels.symbolic import sympy
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
