"""The errors of autoshard; all are `AutoshardError`s."""

from __future__ import annotations


class AutoshardError(Exception):
    """The base class of all errors that autoshard raises."""


class InfeasibleError(AutoshardError):
    """No layout fits; states the largest arrays, the needed and the available bytes per chip, and a topology that fits."""


class UnsupportedPrimitiveError(AutoshardError):
    """A primitive has no rule, and `strict` forbids replication; states the primitive and the source line."""


class PlanMismatchError(AutoshardError):
    """A plan is for another function, other shapes or another file format; states the paths that differ."""


class TopologyError(AutoshardError):
    """A topology is malformed, has an unknown chip, or does not fit the devices."""


class TraceError(AutoshardError):
    """A function or a target file could not be traced; the cause is chained."""


class ExportError(AutoshardError):
    """A plan cannot be expressed in a format; states the arrays, and the formats that can."""


class MissingProgramError(AutoshardError, ValueError):
    """A plan from an older file lacks its program, so it cannot be analysed."""
