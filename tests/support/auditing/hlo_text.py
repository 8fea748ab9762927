"""Compiled programs as text, and the collective that is read from one."""

from __future__ import annotations

import textwrap

from autoshard.auditing.hlo_collectives import CompiledCollective, collectives

CUBE = {"x": 2, "y": 2, "z": 2}

HEADER = """\
HloModule jit_f, num_partitions=8

FileNames
1 "/home/user/model.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=1 function_name_id=1 line=12 end_line=12 column=4 end_column=9}

StackFrames
1 {file_location_id=1 parent_frame_id=1}


%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%scattered (c: f32[], d: f32[]) -> f32[] {
  %c = f32[] parameter(0), metadata={op_name="jit(f)/reduce_scatter"}
  %d = f32[] parameter(1), metadata={op_name="jit(f)/reduce_scatter"}
  ROOT %sum.1 = f32[] add(%c, %d), metadata={op_name="jit(f)/add" stack_frame_id=1}
}

%max (a.1: bf16[], b.1: bf16[]) -> bf16[] {
  %a.1 = bf16[] parameter(0)
  %b.1 = bf16[] parameter(1)
  %larger = f32[] maximum(%a.1, %b.1)
  ROOT %rounded = bf16[] convert(%larger)
}

"""


def program(entry: str, before: str = "") -> str:
    """A module whose entry holds these lines, after these computations; `%p` is f32[8,16] (512 bytes)."""
    body = textwrap.indent(textwrap.dedent(entry).strip(), "  ")
    parameter = "  %p = f32[8,16]{1,0:T(8,128)} parameter(0)"
    return f"{HEADER}{textwrap.dedent(before)}\nENTRY %main (p: f32[8,16]) -> f32[8,16] {{\n{parameter}\n{body}\n}}\n"


def read(entry: str, before: str = "", mesh: dict[str, int] = CUBE) -> CompiledCollective:
    (found,) = collectives(program(entry, before), mesh)
    return found
