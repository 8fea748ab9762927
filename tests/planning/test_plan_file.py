"""Plan files: they round-trip, are written whole or not at all, and a broken one is refused with the reason."""

from __future__ import annotations

import functools
import json
import math
import re
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import autoshard
from autoshard import PlanMismatchError
from autoshard.plan import loads
from autoshard.planning.files import plan_file
from autoshard.planning.files.plan_file import dumps
from autoshard.tracing import pytrees
from search import Layout
from tests.support import strategies
from tests.support.effort import examples
from tests.support.plans import planned_block, small_plan

SIZES = st.sampled_from((1, 2, 3, 4, 8))


@st.composite
def plans(draw) -> autoshard.Plan:
    """Plans of small functions on small meshes, some with donations, loops and constants."""
    rows, inner, columns, depth = (draw(SIZES) for _ in range(4))
    looped, donated = draw(st.booleans()), draw(st.booleans())
    dtype = draw(st.sampled_from((jnp.float32, jnp.bfloat16)))
    constant = jnp.ones((columns,), dtype)

    def fn(x: jax.Array, weights: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
        if looped:
            x, _ = jax.lax.scan(lambda x, layer: (jnp.tanh(x @ layer), None), x, weights["square"])
        return x, {"out": [(x @ weights["out"]) * constant, None]}

    args = (
        jax.ShapeDtypeStruct((rows, inner), dtype),
        {
            "square": jax.ShapeDtypeStruct((depth, inner, inner), dtype),
            "out": jax.ShapeDtypeStruct((inner, columns), dtype),
        },
    )
    topology = draw(st.sampled_from(("cpu:2", "cpu:2x2", "v4:2x2x2", "h100:2x4", "v5e:4x2")))
    return autoshard.search(fn, *args, topology=topology, donate_argnums=0 if donated else ())


Search = tuple[autoshard.Plan, Callable[..., Any], tuple[Any, ...]]


@st.composite
def searches(draw) -> Search:
    """Plans of every kind, with their function and arguments: pins of arguments and of intermediates, constraints on axes
    that the topology lacks or has at size 1, every option of the search, symbolic sizes, and phases."""
    topology = draw(st.sampled_from(("cpu:2x4", "cpu:1x8", "v5e:2x4")))
    axis = st.sampled_from((None, "x", "y"))
    inside, outside = draw(axis), draw(axis)
    constraint = draw(st.sampled_from((None, "x", "y", "model")))
    mesh = jax.sharding.AbstractMesh((1,), (constraint or "x",))
    constant = np.full(8, 0.5, np.float32)

    def fn(x: jax.Array, weights: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        for layer in range(2):
            x = jnp.tanh(x @ weights["layers"][layer])
        if constraint is not None:
            x = jax.lax.with_sharding_constraint(x, jax.sharding.NamedSharding(mesh, P(constraint)))
        return autoshard.pin(x + constant, P(inside)), x.sum()

    struct = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    args = struct((8, 8)), {"layers": struct((2, 8, 8))}
    if draw(st.booleans()):
        traced = autoshard.trace_symbolic(fn, *args, dims={"x": "B E"})
        return traced.bind(B=16).search(topology), fn, (struct((16, 8)), args[1])
    if draw(st.booleans()):
        phases = {"long": autoshard.Workload(fn, args), "wide": autoshard.Workload(fn, (struct((24, 8)), args[1]))}
        return autoshard.search_phases(phases, shared="weights", topology=topology)["long"], fn, args
    pins = draw(
        st.sampled_from((None, {"weights.*": P(None, None, outside)}, {"x": P(outside), "weights.layers": P()}))
    )
    options = {
        "pins": pins,
        "fold": draw(st.booleans()),
        "baselines": draw(st.booleans()),
        "memory_bytes": draw(st.sampled_from((None, 1e9))),
        "donate_argnums": draw(st.sampled_from(((), 0))),
    }
    return autoshard.search(fn, *args, topology=topology, **options), fn, args


# --- laws


@given(searches())
@examples(25)
def test_a_plan_of_any_kind_can_be_loaded_and_run(search: Search) -> None:
    plan, fn, args = search
    loaded = loads(dumps(plan))
    assert loaded == plan
    if loaded.topology.chip.kind == "cpu":
        loaded.jit(fn).lower(*args)


def test_a_plan_with_pins_is_for_the_function_with_its_pins() -> None:
    def fn(x: jax.Array, axis: str = "x") -> jax.Array:
        return autoshard.pin(x * 2, P(axis))

    x = jnp.ones((8, 8))
    plan = loads(dumps(autoshard.search(fn, x, topology="cpu:2x4", pins={"x": P(None, "y")})))
    assert plan.in_specs == (P(None, "y"),)
    assert plan.jit(fn)(x).sum() == 128
    with pytest.raises(PlanMismatchError, match="for another function"):
        plan.jit(lambda x: fn(x, "y"))(x)


@given(plans())
@examples(12)
def test_a_plan_round_trips(plan: autoshard.Plan) -> None:
    text = dumps(plan)
    assert loads(text) == plan
    assert dumps(loads(text)) == text


@given(strategies.topologies())
@examples(20)
def test_every_topology_round_trips(topology) -> None:
    plan = replace(small_plan(), topology=topology)
    assume({"x", "y"} <= set(topology.axis_sizes))
    assert loads(dumps(plan)).topology == topology


def test_the_constants_of_the_chip_keep_their_sources() -> None:
    plan = small_plan()
    assert loads(dumps(plan)).topology.chip.constants == plan.topology.chip.constants


def test_partial_sums_and_odd_numbers_round_trip() -> None:
    plan = small_plan()
    layout = Layout((("x",), ()), ("y",))
    hubs = replace(plan.choice, hubs={3: layout})
    odd = replace(plan, choice=hubs, proof=replace(plan.proof, bound_seconds=-math.inf), name='"ö\n→')
    assert loads(dumps(odd)) == odd


Point = namedtuple("Point", "b a")


def random_pytrees(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    keys = st.text(max_size=3)

    def nodes(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        return st.one_of(
            st.none(),
            st.lists(children, max_size=3),
            st.lists(children, max_size=3).map(tuple),
            st.dictionaries(keys, children, max_size=3),
            st.dictionaries(st.integers(0, 9), children, max_size=3),
            st.dictionaries(keys, children, max_size=3).map(OrderedDict),
            st.builds(Point, children, children),
        )

    return st.recursive(leaves, nodes, max_leaves=8)


@given(random_pytrees(st.integers(0, 99)))
def test_a_tree_of_standard_containers_is_rebuilt(tree: Any) -> None:
    data = json.loads(json.dumps(pytrees.describe(tree)))
    assert pytrees.checked(data) == pytrees.describe(tree)
    assert pytrees.unknown_class(data) is None
    rebuilt = pytrees.rebuild(data, jax.tree.leaves(tree))
    assert rebuilt == tree and jax.tree.structure(rebuilt) == jax.tree.structure(tree)


def test_a_namedtuple_that_nobody_imported_comes_back_as_a_dict() -> None:
    data = {"namedtuple": "a.module.that.is.not:Point", "fields": {"b": "*", "a": None}}
    assert pytrees.rebuild(pytrees.checked(data), [7]) == {"b": 7, "a": None}
    assert pytrees.unknown_class([data][0]) == "a.module.that.is.not:Point"
    renamed = pytrees.describe(Point(1, 2)) | {"fields": {"other": "*"}}
    assert pytrees.rebuild(renamed, [7]) == {"other": 7}


def test_a_file_names_no_class_but_a_namedtuple() -> None:
    data = {"namedtuple": "os:system", "fields": {"command": "*"}}
    assert pytrees.rebuild(pytrees.checked(data), ["true"]) == {"command": "true"}


# --- the file


def test_a_plan_file_can_be_read_by_people() -> None:
    data = json.loads(dumps(planned_block()[0]))
    assert data["autoshard_plan"] == 1 and list(data)[:2] == ["autoshard_plan", "name"]
    rows = {row["path"]: row for row in data["arguments"]}
    assert rows["params['layers']['down']"]["layout"] == [None, "x", None]
    assert rows["params['layers']['norm']"] == {
        "path": "params['layers']['norm']",
        "shape": [2, 8],
        "dtype": "float32",
        "layout": rows["params['layers']['norm']"]["layout"],
        "bytes_per_chip": rows["params['layers']['norm']"]["bytes_per_chip"],
        "donated": False,
        "weak": False,
    }
    down = next(row for row in data["operations"] if "params['layers']['down']" in row["name"] and row["matmul"])
    assert down["strategy"].startswith("WS-1D") and "x" in down["splits"]
    assert data["topology"]["chip"]["bus"]["hop_seconds"]["source"]
    assert max(len(line) for line in dumps(planned_block()[0]).splitlines()) < 2000


def test_saving_writes_the_whole_file_or_nothing(tmp_path, monkeypatch) -> None:
    plan, path = small_plan(), tmp_path / "plan.json"
    plan.save(path)
    before = path.read_text()
    assert autoshard.load(path) == plan

    def fails(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(plan_file.os, "replace", fails)
    with pytest.raises(OSError, match="no space left"):
        replace(plan, name="other").save(path)
    assert path.read_text() == before and [each.name for each in tmp_path.iterdir()] == ["plan.json"]


def test_saving_where_nothing_can_be_written_leaves_nothing(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        small_plan().save(tmp_path / "file" / "plan.json")
    with pytest.raises(FileNotFoundError):
        small_plan().save(tmp_path / "missing" / "plan.json")
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


# --- broken files


def refused(text: str | bytes) -> str:
    with pytest.raises(PlanMismatchError) as error:
        loads(text, "plan.json")
    return str(error.value)


@pytest.mark.parametrize(
    "text, message",
    (
        ("", "plan.json is not valid JSON, or is truncated: Expecting value: line 1 column 1 (char 0)."),
        ("[1, 2]", "plan.json is not an autoshard plan: the key autoshard_plan is missing."),
        ('{"name": "x"}', "plan.json is not an autoshard plan: the key autoshard_plan is missing."),
        ('{"autoshard_plan": "1"}', "plan.json has the invalid version '1'; expected 1."),
        (
            '{"autoshard_plan": 2}',
            "plan.json has version 2, but this autoshard reads versions up to 1; update autoshard, or search again.",
        ),
        ('{"autoshard_plan": 1}', "plan.json is damaged: topology is missing."),
        ("[" * 100_000, "plan.json is not valid JSON, or is truncated: "),
        (b"\xff\xfe\x00", "plan.json is not valid JSON, or is truncated: "),
    ),
    ids=("empty", "a list", "another file", "version as text", "newer", "bare", "deep", "binary"),
)
def test_what_is_no_plan_is_refused(text: str | bytes, message: str) -> None:
    assert refused(text).startswith(message)


@given(st.data())
@examples(60)
def test_a_truncated_plan_is_refused(data) -> None:
    text = dumps(small_plan())
    cut = data.draw(st.integers(0, len(text) - 2))
    refused(text[:cut])


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in nested lists and dicts."""
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path, *(place for key, value in inner for place in places(value, (*path, key)))]


JUNK = st.sampled_from(
    (None, True, -1, 2, 1e400, 10**400, "x", "w", [], ["x", "x"], [[["x"]]], {}, {"list": "*"}, {"dims": 3})
)


@given(st.data(), JUNK)
@examples(400)
def test_a_damaged_plan_is_refused_or_still_a_plan(data, junk: Any) -> None:
    """Whatever one value of the file is replaced by, reading it raises nothing but `PlanMismatchError`."""
    whole = json.loads(dumps(small_plan()))
    *path, last = data.draw(st.sampled_from(places(whole)[1:]))
    inner = functools.reduce(lambda found, key: found[key], path, whole)
    if data.draw(st.booleans()):
        inner[last] = junk
    else:
        del inner[last]
    try:
        plan = loads(json.dumps(whole))
    except PlanMismatchError as error:
        assert re.match(r"The plan (is|has) ", str(error))
    else:
        assert isinstance(plan.in_specs, tuple)
        assert loads(dumps(plan)) == plan


@pytest.mark.parametrize(
    "path, value, message",
    (
        (
            ("arguments", 0, "layout"),
            ["w", None],
            """arguments[0].layout must use only x, y, each at most once, got ["w", null]""",
        ),
        (
            ("arguments", 0, "layout"),
            ["x", "x"],
            """arguments[0].layout must use only x, y, each at most once, got ["x", "x"]""",
        ),
        (("arguments", 0, "layout"), ["x"], "params['w'] has 2 dimensions, but 1 in its layout"),
        (("estimate", "seconds"), "soon", 'estimate.seconds must be a number, got "soon"'),
        (("arguments", 1), 7, "arguments[1] must be an object, got 7"),
        (("in_tree",), {"tuple": ["*"]}, "in_tree has 1 arrays, but arguments has 2"),
        (("in_tree",), {"call": ["*"]}, """"{'call': ['*']}" is not a node of a pytree"""),
        (("operations", 2, "splits"), 3, "operations[2].splits has the wrong type: 3"),
    ),
)
def test_a_damaged_plan_says_where(path: tuple[Any, ...], value: Any, message: str) -> None:
    whole = json.loads(dumps(small_plan()))
    inner = functools.reduce(lambda found, key: found[key], path[:-1], whole)
    inner[path[-1]] = value
    assert refused(json.dumps(whole)) == f"plan.json is damaged: {message}."


def test_a_huge_file_is_not_read(tmp_path) -> None:
    path = tmp_path / "huge.json"
    with open(path, "wb") as file:
        file.truncate(2**30)
    with pytest.raises(PlanMismatchError, match=r"huge.json has 1073741824 bytes; a plan has at most 67108864\."):
        autoshard.load(path)


def test_a_plan_that_is_not_there_is_an_ordinary_error(tmp_path) -> None:
    with pytest.raises(FileNotFoundError):
        autoshard.load(tmp_path / "missing.json")
