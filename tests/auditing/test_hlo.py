"""Reading compiled programs back: every spelling as text; loops and real programs are in files of their own."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

import autoshard
from autoshard.auditing.hlo_collectives import collectives
from autoshard.auditing.hlo_parser import parse, shape_bytes
from tests.support.auditing.hlo_text import CUBE, program, read

GROUPS = [
    ("{{0,1},{2,3},{4,5},{6,7}}", ("z",)),
    ("{{0,4},{1,5},{2,6},{3,7}}", ("x",)),
    ("{{0,1,4,5},{2,3,6,7}}", ("x", "z")),
    ("{{5,1,4,0},{6,7,3,2}}", ("x", "z")),  # in any order
    ("{{0,1,2,3,4,5,6,7}}", ("x", "y", "z")),
    ("{}", ("x", "y", "z")),
    ("{{0},{1},{2},{3},{4},{5},{6},{7}}", ()),
    ("{{0,3},{1,2},{4,7},{5,6}}", None),  # diagonals
    ("{{0,1,2,3}}", ("y", "z")),  # only some of the groups take part
    ("{{0,8}}", None),  # a device that the mesh does not have
    ("[4,2]<=[8]", ("z",)),
    ("[1,8]<=[8]", ("x", "y", "z")),
    ("[4,2]<=[2,4]T(1,0)", ("x",)),
    ("[2,4]<=[2,2,2]T(1,0,2)", ("x", "z")),
    ("[4,2]<=[2,2,2]T(0,2,1)", ("y",)),
    ("mesh['x'=2,'y'=2,'z'=2] {'y'}", ("y",)),
    ("mesh['x'=2,'y'=2,'z'=2] {'z','x'}", ("x", "z")),
    ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", ("y", "z")),
    ("mesh['a'=8] {'a':(2)2}", ("y",)),
    ("mesh['a'=4,'b'=2] {'a':(1)2,'b'}", ("x", "z")),
    ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", ("z",)),
    ("mesh['a'=2,'b'=2,'c'=2], device_ids=(0,4,2,6,1,5,3,7) {'a'}", ("z",)),
    ("mesh[a=4,b=2] {b}", ("z",)),
    ("@mesh<a=4,b=2> {a}", ("x", "y")),
]


@pytest.mark.parametrize(("groups", "axes"), GROUPS, ids=[groups for groups, _ in GROUPS])
def test_axes_are_read_from_every_spelling_of_replica_groups(groups, axes):
    found = read(f"ROOT %r = f32[8,16]{{1,0}} all-reduce(%p), channel_id=1, replica_groups={groups}, to_apply=%add")
    assert found.axes == axes
    assert found.groups == groups


PAIRS = [
    ("{{0,1},{1,0},{2,3},{3,2},{4,5},{5,4},{6,7},{7,6}}", ("z",)),
    ("{{0,2},{2,0}}", ("y",)),
    ("{{0,1},{1,2},{2,3},{3,0}}", ("y", "z")),
    ("{{0,5}}", ("x", "z")),
    ("{{0,9}}", None),
]


@pytest.mark.parametrize(("pairs", "axes"), PAIRS, ids=[pairs for pairs, _ in PAIRS])
def test_a_permutes_axes_are_those_whose_coordinates_change(pairs, axes):
    found = read(f"ROOT %r = f32[8,16]{{1,0}} collective-permute(%p), channel_id=1, source_target_pairs={pairs}")
    assert (found.kind, found.axes, found.bytes) == ("collective-permute", axes, 512)


def test_axes_of_one_device_are_never_named():
    line = "ROOT %r = f32[8,16]{1,0} all-reduce(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add"
    assert read(line, mesh={"x": 2, "y": 1, "z": 4}).axes == ("z",)


SHAPES = [
    ("f32[8,16]{1,0:T(8,128)S(3)}", 512),
    ("bf16[1,4096]{1,0:T(8,128)(2,1)}", 8192),
    ("(f32[4]{0}, bf16[4]{0}, /*index=2*/u32[]{:S(2)})", 16 + 8 + 4),
    ("pred[3]", 3),
    ("s4[5]", 3),
    ("f8e4m3fn[7]", 7),
    ("c64[2]", 16),
    ("f32[<=8,2]", 64),
    ("token[]", 0),
    ("f64[0,5]", 0),
]


@pytest.mark.parametrize(("shape", "size"), SHAPES, ids=[shape for shape, _ in SHAPES])
def test_bytes_of_a_shape_are_unpadded(shape, size):
    assert shape_bytes(shape) == size


def test_bytes_are_the_result_of_a_gather_and_the_operand_of_all_others():
    groups = "replica_groups={{0,1},{2,3},{4,5},{6,7}}"
    gather = read(f"ROOT %r = f32[16,16]{{1,0}} all-gather(%p), {groups}, dimensions={{0}}")
    scatter = read(f"ROOT %r = f32[4,16]{{1,0}} reduce-scatter(%p), {groups}, dimensions={{0}}, to_apply=%add")
    reduce = read(f"ROOT %r = f32[8,16]{{1,0}} all-reduce(%p), {groups}, to_apply=%max")
    exchange = read(f"ROOT %r = f32[4,32]{{1,0}} all-to-all(%p), {groups}, dimensions={{0}}")
    assert [each.bytes for each in (gather, scatter, reduce, exchange)] == [1024, 512, 512, 512]
    assert [each.reduction for each in (gather, scatter, reduce, exchange)] == ["", "add", "max", ""]
    assert {each.dtype for each in (gather, scatter, reduce, exchange)} == {"f32"}
    assert scatter.spelling == "reduce-scatter" and not scatter.asynchronous


def test_where_it_stems_from():
    metadata = 'metadata={op_name="jit(f)/shard_map/psum" stack_frame_id=1}'
    found = read(f"ROOT %r = f32[8,16]{{1,0}} all-reduce(%p), replica_groups={{}}, to_apply=%add, {metadata}")
    assert (found.op_name, found.source) == ("jit(f)/shard_map/psum", "model.py:12")
    metadata = 'metadata={op_type="psum" op_name="f/psum" source_file="/a/b/net.py" source_line=7}'
    found = read(f"ROOT %r = f32[8,16]{{1,0}} all-reduce(%p), replica_groups={{}}, to_apply=%add, {metadata}")
    assert (found.op_name, found.source) == ("f/psum", "net.py:7")


def test_the_metadata_of_a_kernel_has_lines_of_its_own():
    text = """ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %kernel = f32[8]{0} custom-call(%p), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block\\": 512}"
}}, metadata={op_name="f/pallas_call" source_file="/a/net.py" source_line=7}
  ROOT %r = f32[8]{0} copy(%kernel)
}
"""
    module = parse(text)
    (entry,) = module.computations.values()
    assert list(entry.instructions) == ["p", "kernel", "r"] and entry.root == "r"
    assert module.source(entry.instructions["kernel"]) == "net.py:7"


def test_combined_collectives_are_one_with_the_bytes_of_all():
    found = read("""
        %q = bf16[4]{0} parameter(1)
        ROOT %r = (f32[8,16]{1,0}, bf16[4]{0}) all-reduce(%p, /*index=1*/%q), replica_groups=[4,2]<=[8], to_apply=%add
    """)
    assert (found.kind, found.bytes, found.spelling) == ("all-reduce", 512 + 8, "combined 2")


def test_an_all_to_all_in_pieces_is_one():
    found = read("""
        %q = f32[8,16]{1,0} copy(%p)
        ROOT %r = (f32[8,16]{1,0}, f32[8,16]{1,0}) all-to-all(%p, %q), replica_groups={{0,2},{1,3},{4,6},{5,7}}
    """)
    assert (found.axes, found.bytes, found.spelling) == (("y",), 1024, "tuple")


STARTS = [
    "(f32[8,16]{1,0}, f32[16,16]{1,0}) all-gather-start(%p), replica_groups=[4,2]<=[8], dimensions={0}",
    "f32[8,16]{1,0} all-reduce-start(%p), replica_groups=[4,2]<=[8], to_apply=%add",
    "((f32[8,16]{1,0}), f32[4,16]{1,0}) reduce-scatter-start(%p), replica_groups=[4,2]<=[8], to_apply=%add",
    "((f32[8,16]{1,0}), f32[8,16]{1,0}, u32[]{:S(2)}) all-to-all-start(%p), replica_groups=[4,2]<=[8], dimensions={0}",
    "(f32[8,16]{1,0}, f32[8,16]{1,0}, u32[], u32[]) collective-permute-start(%p), source_target_pairs={{0,1},{1,0}}",
]


@pytest.mark.parametrize("start", STARTS, ids=[start.split("(%p)")[0].split()[-1] for start in STARTS])
def test_a_start_and_its_done_count_once(start):
    opcode = start.split("(%p)")[0].split()[-1]
    kind = opcode.removesuffix("-start")
    found = read(f"%s = {start}\nROOT %d = f32[8,16]{{1,0}} {kind}-done(%s)")
    assert (found.kind, found.axes, found.asynchronous, found.spelling) == (kind, ("z",), True, opcode)
    assert found.bytes == (1024 if kind == "all-gather" else 512)


def test_a_computation_handed_to_an_asynchronous_thread_counts_once():
    found = read(
        """
        %s = ((f32[8,16]{1,0}), f32[4,16]{1,0}, u32[]) async-start(%p), calls=%wrapped
        %u = ((f32[8,16]{1,0}), f32[4,16]{1,0}, u32[]) async-update(%s)
        ROOT %d = f32[4,16]{1,0} async-done(%u)
        """,
        """
        %wrapped (q: f32[8,16]) -> f32[4,16] {
          %q = f32[8,16]{1,0} parameter(0)
          ROOT %r = f32[4,16]{1,0} reduce-scatter(%q), replica_groups=[4,2]<=[8], dimensions={0}, to_apply=%add
        }
        """,
    )
    assert (found.kind, found.bytes, found.asynchronous, found.spelling) == ("reduce-scatter", 512, True, "async-start")


def test_a_call_handed_to_another_core_counts_once():
    found = read(
        """
        %s = ((f32[8,16]{1,0}, token[]), f32[16,16]{1,0}) call-start(%p), to_apply=%called
        ROOT %d = f32[16,16]{1,0} call-done(%s)
        """,
        """
        %called (q: f32[8,16]) -> f32[16,16] {
          %q = f32[8,16]{1,0} parameter(0)
          ROOT %r = f32[16,16]{1,0} all-gather(%q), replica_groups=[4,2]<=[8], dimensions={0}
        }
        """,
    )
    assert (found.kind, found.bytes, found.asynchronous, found.spelling) == ("all-gather", 1024, True, "call-start")


def test_a_collective_spread_over_a_chain_of_fusions_counts_once():
    config = 'backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}'
    gather = f'all-gather(%q), channel_id=11, replica_groups=[4,2]<=[8], frontend_attributes={{chain_id="0"}}, {config}'
    pieces = "".join(
        f"""
%{name} (q: f32[8,16]) -> f32[16,16] {{
  %q = f32[8,16]{{1,0}} parameter(0)
  %g = f32[16,16]{{1,0}} {gather}
  {root}
}}
"""
        for name, root in [
            ("start", 'ROOT %c = (f32[16,16]{1,0}, u32[]) custom-call(%g), custom_call_target="AsyncCollectiveStart"'),
            ("middle", "ROOT %t = (f32[8,16]{1,0}, f32[16,16]{1,0}) tuple(%q, %g)"),
            ("done", 'ROOT %c = f32[16,16]{1,0} custom-call(%q, %g), custom_call_target="AsyncCollectiveDone"'),
        ]
    )
    chain = """
        %s = (f32[16,16]{1,0}, u32[]) fusion(%p), kind=kCustom, calls=%start
        %m = (f32[8,16]{1,0}, f32[16,16]{1,0}) fusion(%s), kind=kOutput, calls=%middle
        ROOT %d = f32[16,16]{1,0} fusion(%m), kind=kCustom, calls=%done
    """
    found = read(chain, pieces)
    assert (found.kind, found.bytes, found.asynchronous) == ("all-gather", 1024, True)
    assert found.spelling == "async collective fusion"
    headless = chain.replace("calls=%start", "calls=%middle")
    assert read(headless, pieces).kind == "all-gather"  # never dropped, even where no start is to be seen


SCATTER_FUSION = """
    %all-reduce-scatter.1 (q: f32[8,16]) -> f32[3,16] {
      %q = f32[8,16]{1,0} parameter(0)
      %zero = f32[] constant(0)
      %padded = f32[12,16]{1,0} pad(%q, %zero), padding=0_4x0_0
      %all = f32[12,16]{1,0} all-reduce(%padded), channel_id=2, replica_groups=[2,4]<=[8], to_apply=%scattered
      %table = u32[8]{0} constant({...})
      ROOT %mine = f32[3,16]{1,0} dynamic-slice(%all, %zero, %zero), dynamic_slice_sizes={3,16}
    }
"""


def test_the_tpus_fusion_of_all_reduce_and_slice_is_a_reduce_scatter():
    found = read("ROOT %f = f32[3,16]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1", SCATTER_FUSION)
    assert (found.kind, found.axes, found.spelling) == ("reduce-scatter", ("y", "z"), "all-reduce-scatter fusion")
    assert found.bytes == 512  # of the operand before it was padded
    assert (found.op_name, found.source) == ("jit(f)/reduce_scatter", "model.py:12")  # its reducer remembers


def test_rows_that_padding_left_with_the_neighbour_are_named():
    fixed = """
        %f = f32[3,16]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
        %rows = f32[1,16]{1,0} slice(%f), slice={[2:3], [0:16]}
        %s = (f32[1,16]{1,0}, f32[1,16]{1,0}) collective-permute-start(%rows), source_target_pairs={{0,1},{1,2}}
        ROOT %d = f32[1,16]{1,0} collective-permute-done(%s)
    """
    scatter, permute = collectives(program(fixed, SCATTER_FUSION), CUBE)
    assert (scatter.kind, permute.kind, permute.spelling) == (
        "reduce-scatter",
        "collective-permute",
        "reduce-scatter realignment",
    )


def test_a_gather_by_all_reduce_is_named():
    entry = """
        %zero = f32[] constant(0)
        %ground = f32[16,16]{1,0} broadcast(%zero), dimensions={}
        %at = u32[] partition-id()
        %block = f32[16,16]{1,0} fusion(%ground, %p, %at), kind=kLoop, calls=%write
        ROOT %r = f32[16,16]{1,0} all-reduce(%block), replica_groups=[4,2]<=[8], to_apply=%add
    """
    before = """
        %write (g: f32[16,16], q: f32[8,16], i: u32[]) -> f32[16,16] {
          %g = f32[16,16]{1,0} parameter(0)
          %q = f32[8,16]{1,0} parameter(1)
          %i = u32[] parameter(2)
          ROOT %w = f32[16,16]{1,0} dynamic-update-slice(%g, %q, %i, %i)
        }
    """
    found = read(entry, before)
    assert (found.kind, found.bytes, found.spelling) == ("all-reduce", 1024, "gather by all-reduce")
    elsewhere = entry.replace("constant(0)", "constant(1)")
    assert read(elsewhere, before).spelling != "gather by all-reduce"


def test_a_scatter_by_all_reduce_is_named():
    found = read("ROOT %r = f32[8,16]{1,0} all-reduce(%p), replica_groups=[4,2]<=[8], to_apply=%scattered")
    assert (found.kind, found.bytes, found.spelling) == ("all-reduce", 512, "scatter by all-reduce")
    assert (found.op_name, found.source) == ("jit(f)/reduce_scatter", "model.py:12")


def test_a_collective_may_change_the_type():
    gather = read("ROOT %r = bf16[16,16]{1,0} all-gather(%p), replica_groups=[4,2]<=[8], dimensions={0}")
    reduce = read("ROOT %r = bf16[8,16]{1,0} all-reduce(%p), replica_groups=[4,2]<=[8], to_apply=%max")
    assert (gather.bytes, gather.dtype) == (512, "bf16")
    assert (reduce.bytes, reduce.dtype) == (512, "f32")


def test_both_branches_of_a_conditional_are_read():
    branch = """
        %b{0} (q{0}: f32[8,16]) -> f32[8,16] {{
          %q{0} = f32[8,16]{{1,0}} parameter(0)
          ROOT %r{0} = f32[8,16]{{1,0}} all-reduce(%q{0}), replica_groups={1}, to_apply=%add
        }}
    """
    branches = textwrap.dedent(branch.format(0, "[4,2]<=[8]") + branch.format(1, "[2,4]<=[8]"))
    choice = "%c = pred[] constant(true)\nROOT %r = f32[8,16]{1,0} conditional(%c, %p, %p), "
    for regions in ("branch_computations={%b0, %b1}", "true_computation=%b0, false_computation=%b1"):
        assert [each.axes for each in collectives(program(choice + regions, branches), CUBE)] == [("z",), ("y", "z")]


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="holds no ENTRY computation"):
        collectives("module @jit_f { }", CUBE)


def test_names_may_lack_their_percent_signs():
    text = program("ROOT %r = f32[8,16]{1,0} all-reduce(f32[8,16]{1,0} %p), replica_groups={}, to_apply=%add")
    (found,) = collectives(text.replace("%", ""), CUBE)
    assert (found.bytes, found.reduction) == (512, "add")


def test_a_large_program_is_read_in_one_pass():
    metadata = f'metadata={{op_name="{"x" * 400}"}}'
    line = "%r{} = f32[8,16]{{1,0}} all-reduce(%p), replica_groups={{}}, to_apply=%add, "
    text = program("\n".join(line.format(i) + metadata for i in range(21_000)))
    assert len(text) > 10_000_000
    assert len(parse(text).computations["main"].instructions) == 21_001


# --- What the partitioner does unasked


SLICED = [
    ("%s = f32[4,16]{1,0} dynamic-slice(%g, %i, %i), dynamic_slice_sizes={4,16}", True),
    ("%c = f32[16,16]{0,1} copy(%g)\n%s = f32[4,16]{1,0} dynamic-slice(%c, %i, %i), dynamic_slice_sizes={4,16}", True),
    ("%s = f32[4,16]{1,0} fusion(%i, %g), kind=kLoop, calls=%cut", True),
    ("%s = f32[16,16]{1,0} fusion(%i, %g), kind=kLoop, calls=%whole", False),
    (
        "%t = f32[16,16]{1,0} tanh(%g)\n%s = f32[4,16]{1,0} dynamic-slice(%g, %i, %i), dynamic_slice_sizes={4,16}",
        False,
    ),
    ("%s = f32[4,16]{1,0} negate(%p)", False),
]
FUSED = """
    %cut (i.1: s32[], g.1: f32[16,16]) -> f32[4,16] {
      %i.1 = s32[] parameter(0)
      %g.1 = f32[16,16]{1,0} parameter(1)
      ROOT %d.1 = f32[4,16]{1,0} dynamic-slice(%g.1, %i.1, %i.1), dynamic_slice_sizes={4,16}
    }

    %whole (i.2: s32[], g.2: f32[16,16]) -> f32[16,16] {
      %i.2 = s32[] parameter(0)
      %g.2 = f32[16,16]{1,0} parameter(1)
      ROOT %d.2 = f32[16,16]{1,0} negate(%g.2)
    }
"""


@pytest.mark.parametrize(("uses", "only_sliced"), SLICED, ids=["slice", "copy", "fusion", "whole", "both", "unused"])
def test_an_array_that_is_gathered_for_its_slices_is_told_apart(uses, only_sliced):
    gather = "%g = f32[16,16]{1,0} all-gather(%p), replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}"
    assert read(f"%i = s32[] constant(0)\n{gather}\n{uses}", FUSED).only_sliced == only_sliced


def test_no_line_of_our_own_code_is_the_users() -> None:
    ours = str(Path(autoshard.__file__).parent / "emitting" / "bind.py")
    at = "stack_frame_id=1"
    line = f'ROOT %n = f32[8,16]{{1,0}} negate(%p), metadata={{op_name="jit(f)/neg" {at}}}'
    for path, source in (("/home/user/model.py", "model.py:12"), (ours, "")):
        table = parse(program(line).replace("/home/user/model.py", path))
        older = parse(program(line.replace(at, f'source_file="{path}" source_line=12')))
        for module in (table, older):
            root = module.computations[module.entry].instructions["n"]
            assert module.source(root) == source
