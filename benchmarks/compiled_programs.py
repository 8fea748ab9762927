"""Compiled programs kept in a folder by their lowered text, so that a row whose program is unchanged is only searched again.

The key is the lowered text, the compiler's options and version, and the slice: all that the compiler sees.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import lzma
from pathlib import Path
from typing import Any

import autoshard
from autoshard.auditing.audit import compare, compiled_peak_bytes, lower

FOLDER = Path(__file__).resolve().parent.parent / ".cache" / "programs"


def audit_of(plan: autoshard.Plan, work: Any, folder: Path = FOLDER) -> tuple[Any, bool]:
    """The audit of a plan for its own TPU, and whether the compiled program was in the folder."""
    lowered, arrays = lower(plan, work.fn, *work.args, target="tpu")
    kept = folder / f"{_key(plan, lowered)}.xz"
    if kept.exists():
        found = json.loads(lzma.decompress(kept.read_bytes()))
        return compare(plan, found["text"], "tpu", found["peak"], arrays), True
    compiled = lowered.compile()
    text, peak = compiled.as_text(), compiled_peak_bytes(compiled.memory_analysis())
    folder.mkdir(parents=True, exist_ok=True)
    kept.write_bytes(lzma.compress(json.dumps({"text": text, "peak": peak}).encode(), preset=0))
    return compare(plan, text, "tpu", peak, arrays), False


def _key(plan: autoshard.Plan, lowered: Any) -> str:
    parts = [lowered.as_text(), str(plan.topology.name), repr(plan.topology.shape), repr(plan.emission)]
    parts += [importlib.metadata.version(name) for name in ("libtpu", "jaxlib")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
