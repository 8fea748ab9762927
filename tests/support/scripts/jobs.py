"""A small sweep job over `sweep_target.py`."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

from autoshard.sweep.job import Job
from autoshard.sweep.job_file import load_job
from tests.support.scripts import sweep_target

JOB = """
name = "toy"

[phases.decode]
target = "sweep_target.py:network"
arguments = { batch = { of = "batch" }, width = { of = "width" }, dtype = { of = "weights" } }

[vary]
batch = [8, 64]
width = [256, 1024]
weights = ["bfloat16", "float32"]

[chips]
kinds = "v5e"
counts = [4]
any_shape = true

[price]
per_chip_hour = { v5e = 1.2 }
"""


def written(folder: Path, text: str = JOB) -> Path:
    path = folder / "toy.toml"
    path.write_text(dedent(text).replace("sweep_target.py", sweep_target.__file__))
    return path


def job(folder: Path, text: str = JOB) -> Job:
    return load_job(written(folder, text))
