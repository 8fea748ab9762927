"""Job files: keys, lines and faults."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from autoshard.cli import app
from autoshard.sweep.job import JobError
from autoshard.sweep.job_file import line_of, load_job
from tests.support.scripts.jobs import JOB, job, written


@pytest.mark.parametrize(
    ("line", "with_this", "says"),
    [
        ("batch = [8, 64]", "batch = []", "line 9: vary.batch: must have at least one entry, got none"),
        ("counts = [4]", "counts = [0]", "line 15: chips.counts.0: input should be greater than or equal to 1, got 0"),
        ("counts = [4]", "cuonts = [4]", "line 15: chips.cuonts: is not a key of a job"),
        ("[price]", "[prices]", "line 18: prices: is not a key of a job"),
        ('kinds = "v5e"', "", "line 13: chips: must have topologies, or kinds and counts"),
        (
            'of = "batch"',
            'of = "batches"',
            "line 6: phases.decode.arguments.batch: 'batches': batches must be a number among the job's variables batch",
        ),
        ("network", "network-2", "line 5: phases.decode.target: "),
        ("sweep_target", "no_such_file", "line 5: phases.decode.target: there is no file"),
        ("[phases.decode]", "[phases.other]", "line 4: phases.other: a phase that is neither prefill nor decode needs"),
        ("v5e = 1.2", "v5e = -1", "line 19: price.per_chip_hour.v5e: input should be greater than 0, got -1"),
        ("width = [256, 1024]", "width = [256, 1024", "is not valid TOML: "),
        (
            "width = [256, 1024]",
            "width = 256\nbatch = 3",
            "is not valid TOML: Cannot overwrite a value (at line 11, column 10): batch = 3.",
        ),
        (
            "[vary]",
            "[together]\nphases = ['decode', 'chat']\n[vary]",
            "line 9: together.phases: unknown phase 'chat'",
        ),
        (
            "[vary]",
            "[together]\nphases = ['decode']\n[vary]",
            "line 9: together.phases: must name two or more phases, got decode",
        ),
        ('kinds = "v5e"', 'kinds = ["v5e", "v5x"]', "line 14: chips.kinds.1: there is no chip 'v5x' in the catalogue"),
        ("counts = [4]", "counts = [4, 7]", "line 15: chips.counts.1: there is no slice of 7 v5e chips"),
        ("counts = [4]", "topologies = ['v5e:4x']", "line 15: chips.topologies.0: "),
        ("counts = [4]", "topologies = ['mine.toml']", "line 15: chips.topologies.0: "),
        (":network", ":netwrok", "line 5: phases.decode.target: "),
        (
            "dtype = {",
            "type = {",
            "line 6: phases.decode.arguments: network takes batch, width, dtype, trouble, sign: ",
        ),
        ("batch = [8, 64]", "batch = [8, 64]\ncontext = 7", "line 10: vary.context: nothing depends on it"),
        ("v5e = 1.2", "v4 = 3.2, v5e = 1.2", "line 19: price.per_chip_hour.v4: the job has no chip v4; it has v5e"),
        (
            "counts = [4]",
            'counts = [4]\ntopologies = ["v4:2x2x1"]',
            "line 20: price.per_chip_hour: lacks a price of v4; give prices of all chips of the job, or of none",
        ),
        (
            "[price]",
            "[constraints]\nseconds_to_first_token = 1\n[price]",
            "line 19: constraints.seconds_to_first_token: applies to prefill phases only, and there are none",
        ),
        (
            "[price]",
            "[frontier]\nper = 'size'\n[price]",
            "line 19: frontier.per: size is not a variable; the variables are batch, width, weights",
        ),
    ],
)
def test_a_bad_job_file_is_refused_with_line_and_key(tmp_path: Path, line: str, with_this: str, says: str):
    with pytest.raises(JobError) as caught:
        job(tmp_path, JOB.replace(line, with_this))
    assert says in str(caught.value)


def test_all_faults_of_a_job_file_are_listed_at_once(tmp_path: Path):
    with pytest.raises(JobError) as caught:
        job(tmp_path, JOB.replace("counts = [4]", "counts = [0]").replace("[price]", "[prices]"))
    assert len(str(caught.value).splitlines()) == 2


def test_the_line_of_a_missing_key_is_that_of_its_table():
    assert line_of(JOB, ("chips", "colour")) == 13
    assert line_of(JOB, ("phases", "decode", "target")) == 5
    assert line_of("", ("chips",)) == 0


def test_the_command_refuses_a_bad_job(tmp_path: Path):
    done = CliRunner().invoke(app, ["sweep", str(written(tmp_path, JOB.replace("[vary]", "[varies]")))])
    assert done.exit_code == 2
    assert "line 8: varies" in done.output


def test_all_faults_of_a_job_are_reported_at_once(tmp_path: Path) -> None:
    job = tmp_path / "job.toml"
    job.write_text(
        'nmae = "x"\n[phases.decode]\ntarget = "gone.py:decode"\narguments = { batch = { of = "batch" } }\n'
        '[vary]\nbatch = [1]\nunused = [1]\n[chips]\nkinds = ["v9"]\ncounts = [4, "8"]\n'
    )
    with pytest.raises(JobError) as error:
        load_job(job)
    lines = str(error.value).splitlines()
    assert len(lines) == 5
    for line, name in (
        (1, "nmae"),
        (10, "chips.counts.1"),
        (9, "chips.kinds.0"),
        (3, "phases.decode.target"),
        (7, "vary.unused"),
    ):
        assert any(f"line {line}: {name}: " in each for each in lines), (line, name, lines)
