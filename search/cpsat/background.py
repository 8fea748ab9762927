"""OR-Tools, imported in the background of a search: the import takes half a second, most of it for pandas."""

from __future__ import annotations

import importlib
import threading


def begin_import() -> None:
    """Begins to import CP-SAT in a thread of its own. A later import waits for the rest."""
    threading.Thread(target=importlib.import_module, args=(f"{__package__}.solver",), daemon=True).start()
