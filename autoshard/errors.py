"""The errors of autoshard; all are `AutoshardError`s."""

from __future__ import annotations


class AutoshardError(Exception):
    """The base class of all errors that autoshard raises.

    `is_usage` marks what the caller has to write differently: an option, a name or a value that does not exist. Commands exit
    with 2 for it, and with 1 for all other errors.
    """

    is_usage = False


class OptionError(AutoshardError):
    """An option or a name that does not exist, or a value that it cannot have; states those that it can."""

    is_usage = True


class InfeasibleError(AutoshardError):
    """No layout fits; states the largest arrays, the needed and the available bytes per chip, and a topology that fits."""


class UnsupportedPrimitiveError(AutoshardError):
    """A primitive has no rule, and `strict` forbids replication; states the primitive and the source line."""


class PlanMismatchError(AutoshardError):
    """A plan is for another function, other shapes or another file format; states the paths that differ."""


class TopologyError(AutoshardError):
    """A topology is malformed, has an unknown chip, or does not fit the devices."""

    is_usage = True


class TraceError(AutoshardError):
    """A function or a target file could not be traced; the cause is chained."""


class ExportError(AutoshardError):
    """A plan cannot be expressed in a format; states the arrays, and the formats that can."""


class UnknownNameError(ExportError, OptionError):
    """A plan has no argument, or no mesh axis, of this name; states those that it has."""


class MissingProgramError(AutoshardError, ValueError):
    """A plan from an older file lacks its program, so it cannot be analysed."""
