"""Exports as ordered rules: the first regular expression that `re.search` finds in a `/`-joined path applies.

Rules are not anchored at their start, so the rules of the parameters also apply to an optimizer's state, whose paths end with
the parameters' own: `(^|/)layers/wq$` matches `params/layers/wq` and `opt_state/0/mu/layers/wq`. Longer paths come first.
Numbers become `\\d+` if all arrays whose paths differ only in numbers have one layout. Siblings with one layout share a rule.
A rule is omitted if later rules give its arrays the same layout. The last rule, `.*`, replicates everything else.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

from autoshard.errors import ExportError
from autoshard.export import python
from autoshard.export.arrays import Axes, Leaf, Spec, leaves
from autoshard.export.python import sequence
from autoshard.export.specs import module
from autoshard.planning.records import PlanRecord

Rule = tuple[str, Spec]
_Path = tuple[str, ...]
_REST = ".*"
_EMBEDDED = ("opt_state", "0", "mu")
"""The path of an optimizer's copy of the parameters, with which the rules are checked."""


def render(plan: PlanRecord, argument: str | int | None = None, axes: Axes = None) -> str:
    """`MESH_SHAPE` and `PARTITION_RULES`.

    **Raises:** `ExportError` if two arrays with different layouts have the same path.
    """
    found = [
        sequence([_pattern(pattern), python.spec(entries)])
        for pattern, entries in partition_rules(plan, argument, axes)
    ]
    doc = (
        f"The layouts of {plan.name}, planned for {plan.topology.name}, as rules.\n\n"
        "The first of PARTITION_RULES whose pattern re.search finds in an array's '/'-joined path is the array's layout."
    )
    return module(plan, doc, axes, set(), {"PARTITION_RULES": sequence(found)})


def _pattern(pattern: str) -> str:
    raw = "\\" in pattern and '"' not in pattern and pattern.isprintable()
    return f'r"{pattern}"' if raw else python.literal(pattern)


def partition_rules(plan: PlanRecord, argument: str | int | None = None, axes: Axes = None) -> tuple[Rule, ...]:
    """The rules for all arguments, or for one, whose name is then not part of its paths.

    **Raises:** `ExportError`.
    """
    return rules_for(leaves(plan, argument, axes), argument is not None)


def spec_at(rules: Iterable[Rule], path: str) -> Spec | None:
    """The entries of the rule that applies to a path; `None` if no rule matches."""
    return next((spec for pattern, spec in rules if re.search(pattern, path)), None)


def rules_for(arrays: Sequence[Leaf], inside: bool = False) -> tuple[Rule, ...]:
    """Rules that give each array its layout; `inside` an argument, whose name is omitted.

    **Raises:** `ExportError`.
    """
    _refuse_ambiguous(arrays, inside)
    needed = _rule_paths(arrays, inside)
    ordered = sorted(_merge(needed), key=lambda rule: (-len(rule[0]), rule[1]))
    found = [("(^|/)" + "/".join(parts) + "$", spec) for parts, _, spec in ordered]
    rules = _drop_redundant([*found, (_REST, ())], _expected_specs(needed, arrays, inside))
    wrong = [leaf for leaf in arrays if spec_at(rules, _own_path(leaf, inside)) != leaf.spec]
    exact = [(f"^{re.escape(_own_path(leaf, inside))}$", leaf.spec) for leaf in wrong]
    return (*exact, *rules)


def _own_path(leaf: Leaf, inside: bool) -> str:
    return "/".join(leaf.inner) if inside else leaf.path


def _refuse_ambiguous(arrays: Sequence[Leaf], inside: bool) -> None:
    seen: dict[str, Leaf] = {}
    for leaf in arrays:
        other = seen.setdefault(_own_path(leaf, inside), leaf)
        if other.spec != leaf.spec:
            raise ExportError(
                f"Two arrays have the path {leaf.path} (a key contains a /) and different layouts: {python.spec(other.spec)}"
                f" and {python.spec(leaf.spec)}. Rules cannot distinguish them; export specs."
            )


def _rule_paths(arrays: Sequence[Leaf], inside: bool) -> dict[_Path, Leaf]:
    """The paths of the rules: inside the argument, or with its name if arguments disagree."""
    by_form: dict[_Path, set[Spec]] = defaultdict(set)
    for leaf in arrays:
        by_form[leaf.inner].add(leaf.spec)
    found: dict[_Path, Leaf] = {}
    for leaf in arrays:
        alike = inside or len(by_form[leaf.inner]) == 1
        found[leaf.inner if alike else tuple(leaf.path.split("/"))] = leaf
    return found


def _expected_specs(needed: dict[_Path, Leaf], arrays: Sequence[Leaf], inside: bool) -> dict[str, Spec]:
    """The expected layout of each array, and of its copy in an optimizer's state unless an array has that path."""
    found = {_own_path(leaf, inside): leaf.spec for leaf in arrays}
    for path, leaf in needed.items():
        for embedded in (path, (*_EMBEDDED, *path)):
            found.setdefault("/".join(embedded), leaf.spec)
    return found


def _merge(needed: dict[_Path, Leaf]) -> list[tuple[_Path, str, Spec]]:
    """The paths as patterns; paths that differ only in numbers or in their last part share one: (parts, name, spec)."""
    forms: dict[_Path, dict[Spec, list[_Path]]] = defaultdict(lambda: defaultdict(list))
    for path, leaf in needed.items():
        forms[tuple(map(_form, path))][leaf.spec].append(path)
    siblings: dict[tuple[str, _Path, Spec], list[str]] = defaultdict(list)
    for form, by_spec in forms.items():
        for spec, paths in by_spec.items():
            for parts in [form] if len(by_spec) == 1 else _literal(paths):
                siblings[needed[paths[0]].head, parts[:-1], spec].append(parts[-1])
    return [((*parent, _alternation(last)), "/".join(parent), spec) for (_, parent, spec), last in siblings.items()]


def _form(part: str) -> str:
    """One part of a path as a pattern, with numbers generalised."""
    return re.sub(r"\d+", r"\\d+", re.escape(part))


def _literal(paths: Sequence[_Path]) -> list[_Path]:
    """Paths that differ in numbers, as patterns; one pattern with all the numbers if only one part differs."""
    differing = [at for at in range(len(paths[0])) if len({path[at] for path in paths}) > 1]
    if len(differing) != 1:
        return [tuple(map(re.escape, path)) for path in paths]
    (at,) = differing
    parts = list(map(re.escape, paths[0]))
    parts[at] = _alternation([re.escape(path[at]) for path in paths])
    return [tuple(parts)]


def _alternation(patterns: Sequence[str]) -> str:
    unique = sorted(set(patterns))
    return unique[0] if len(unique) == 1 else f"(?:{'|'.join(unique)})"


def _drop_redundant(rules: Sequence[Rule], expected: dict[str, Spec]) -> list[Rule]:
    """Rules without redundant ones: those whose paths get the same layout from later rules."""
    compiled = [re.compile(pattern) for pattern, _ in rules]
    decided: dict[int, list[str]] = defaultdict(list)
    for path in expected:
        decided[next(k for k, pattern in enumerate(compiled) if pattern.search(path))].append(path)
    kept: list[int] = [len(rules) - 1]
    for k in reversed(range(len(rules) - 1)):
        later = {path: next(j for j in reversed(kept) if compiled[j].search(path)) for path in decided[k]}
        if any(rules[j][1] != rules[k][1] for j in later.values()):
            kept.append(k)
        else:
            for path, j in later.items():
                decided[j].append(path)
    return [rules[k] for k in reversed(kept)]
