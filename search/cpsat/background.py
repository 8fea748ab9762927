"""OR-Tools, imported beside the first work of a search: it takes half a second, most of it pandas."""

from __future__ import annotations

import importlib
import threading


def begin_import() -> None:
    """Begins to import CP-SAT in a thread of its own; whoever needs it waits for the rest."""
    threading.Thread(target=importlib.import_module, args=("search.cpsat.solver",), daemon=True).start()
