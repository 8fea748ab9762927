"""Plans as JSON: versioned, readable and deterministic; loading a plan never executes code.

```json
{"autoshard_plan": 1,
 "name": "decode", "fingerprint": "8f3c...", "jax_version": "0.10.2", "donate_argnums": [1],
 "topology": {"name": "v4:4x4x4", "chip": {...}, "axes": [...]},
 "estimate": {"seconds": 0.0235, ...}, "proof": {"status": "OPTIMAL", ...}, "warnings": [...],
 "arguments": [{"path": "params['layers']['wq']", "shape": [118, 18432, 64, 256], "dtype": "bfloat16",
                "layout": [null, null, ["x", "y", "z"], null], ...}],
 "operations": [{"name": "dot_general params['layers']['wq'] (palm.py:212)", "strategy": "WS-1D: output over xyz",
                 "einsum": "ad,dbc->abc", "splits": [null, ["x", "y", "z"], null, null], ...}],
 "kept": [{"value": 12, "layout": [null, "x"]}], "program": {...}}
```

A layout has one entry per dimension, as a `PartitionSpec` has: null, an axis, or a list of axes, major to minor; partial
sums are `{"dims": [...], "partial": ["x"]}`. An array's "order" has its dimensions in memory, major to minor; an array
without one has the device's default order. Numbers that JSON lacks are the strings "inf", "-inf" and "nan". "program" is
as in `program_file`; older files lack it. "carriage" is there once ways to carry the plan are compiled.
"""

from __future__ import annotations

import json
import math
import os
from os import PathLike
from pathlib import Path
from typing import Any

from autoshard._util.files import write_whole
from autoshard.errors import PlanMismatchError
from autoshard.planning.files.from_json import from_json
from autoshard.planning.files.json_reader import Reader
from autoshard.planning.files.to_json import to_json
from autoshard.planning.records import PlanRecord

VERSION = 1
"""The version of the format; newer versions are rejected."""
_MOST_BYTES = 64 * 2**20
"""The size of the largest file that is read; 126 unrolled layers take 10 MiB."""
_MOST_VALUES = 2**22
"""The largest number of values in a file, counted by commas and brackets: a value takes up to 0.2 KiB of memory."""


Json = dict[str, Any]


def save(plan: PlanRecord, path: str | PathLike[str]) -> None:
    """Writes a plan to a file atomically: a concurrent reader sees the old file or the new one.

    **Raises:** `OSError` if the file cannot be written; no partial file is left.
    """
    write_whole(Path(path), dumps(plan))


def load(path: str | PathLike[str]) -> PlanRecord:
    """Reads a plan from a file.

    **Raises:** `PlanMismatchError`, with the reason, for anything that is not a plan of this version or an older one;
    `OSError` if there is no such file.
    """
    size = os.stat(path).st_size
    if size > _MOST_BYTES:
        raise PlanMismatchError(f"{path} has {size} bytes; a plan has at most {_MOST_BYTES}.")
    return loads(Path(path).read_bytes(), str(path))


def dumps(plan: PlanRecord) -> str:
    """A plan as JSON text."""
    return _lines({"autoshard_plan": VERSION} | to_json(plan)) + "\n"


def loads(text: str | bytes, where: str = "The plan") -> PlanRecord:
    """The inverse of `dumps`; `where` names the text in messages.

    **Raises:** `PlanMismatchError`.
    """
    many = sum(text.count(sign if isinstance(text, str) else sign.encode()) for sign in ",[{")  # pyright: ignore
    if many > _MOST_VALUES:
        raise PlanMismatchError(f"{where} has {many} values; a plan has at most {_MOST_VALUES}.")
    try:
        data = json.loads(text, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as error:
        raise PlanMismatchError(f"{where} is not valid JSON, or is truncated: {error}.") from error
    if not isinstance(data, dict) or "autoshard_plan" not in data:
        raise PlanMismatchError(f"{where} is not an autoshard plan: the key autoshard_plan is missing.")
    version = data["autoshard_plan"]
    if type(version) is not int or version < 1:
        raise PlanMismatchError(f"{where} has the invalid version {version!r}; expected {VERSION}.")
    if version > VERSION:
        raise PlanMismatchError(
            f"{where} has version {version}, but this autoshard reads versions up to {VERSION};"
            " update autoshard, or search again."
        )
    try:
        return from_json(Reader(data, ""))
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError, AttributeError, IndexError) as error:
        raise PlanMismatchError(f"{where} is damaged: {error}.") from error


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a JSON number")
    return value


def _lines(data: Json) -> str:
    """Readable JSON: one line per entry of the long lists, and per number of the short tables."""

    def compact(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)

    entries = []
    for key, value in data.items():
        if isinstance(value, list) and value and isinstance(value[0], dict | list):
            rows = ",\n  ".join(map(compact, value))
            entries.append(f" {compact(key)}: [\n  {rows}\n ]")
        elif isinstance(value, dict) and key == "program":
            entries.append(f" {compact(key)}: " + _lines(value).replace("\n", "\n "))
        elif isinstance(value, dict) and key in ("estimate", "topology"):
            entries.append(f" {compact(key)}: " + _to_text(value))
        else:
            entries.append(f" {compact(key)}: {compact(value)}")
    return "{\n" + ",\n".join(entries) + "\n}"


def _to_text(value: Json) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=1).replace("\n", "\n ")
