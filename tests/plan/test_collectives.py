"""What devices exchange is read off the text of a compiled program: kinds, bytes, and how often loops run them."""

import pytest

from xformers_lab.plan import collectives, hlo, loops

# As XLA prints it for a TPU: a collective that begins and ends in fusions with other work, under one channel; loops
# with a counter; layouts in brackets of their own.
PROGRAM = """\
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%start (p: bf16[64,128]) -> bf16[128,128] {
  %p = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %gathered = bf16[128,128]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=7, dimensions={0}
}

%done (p: bf16[64,128]) -> bf16[128,128] {
  %p = bf16[64,128]{1,0} parameter(0)
  ROOT %gathered.1 = bf16[128,128]{1,0} all-gather(%p), channel_id=7, replica_groups=[2,2]<=[4], dimensions={0}
}

%condition (state: (s32[], bf16[64,128])) -> pred[] {
  %limit = s32[]{:T(128)} constant(CONSTANT)
  %state = (s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %at = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %lt = pred[]{:T(512)} compare(%at, %limit), direction=LT, metadata={op_name="while/cond/lt"}
}

%body (state: (s32[], bf16[64,128])) -> (s32[], bf16[64,128]) {
  %state = (s32[], bf16[64,128], /*index=2*/f32[]) parameter(0)
  %at = s32[] get-tuple-element(%state), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%at, %one)
  %x = bf16[64,128] get-tuple-element(%state), index=1
  %async-start = bf16[128,128] fusion(%x), kind=kCustom, calls=%start
  %async-done = bf16[128,128] fusion(%x), kind=kCustom, calls=%done
  ROOT %new = (s32[], bf16[64,128]) tuple(%next, %x)
}

ENTRY %main (x: bf16[64,128], y: f32[10]) -> f32[10] {
  %x = bf16[64,128]{1,0} parameter(0)
  %y = f32[10]{0} parameter(1)
  %zero = s32[] constant(0)
  %begin = (s32[], bf16[64,128]) tuple(%zero, %x)
  %loop = (s32[], bf16[64,128]) while(%begin), condition=%condition, body=%bodyKNOWN
  %sent = (f32[10], f32[10], u32[], u32[]) collective-permute-start(%y), source_target_pairs={{0,1},{1,0}}
  %got = f32[10] collective-permute-done(%sent)
  ROOT %total = f32[10]{0} all-reduce(%got), channel_id=9, to_apply=%add
}
"""
COUNTED = PROGRAM.replace("CONSTANT", "5").replace("KNOWN", "")


def rows(text: str) -> dict[str, dict]:
    return {row.pop("kind"): row for row in collectives.of(text)}


def test_collectives_count_by_kind_with_their_bytes_and_loops():
    found = rows(COUNTED)
    assert found["all-gather"] == {"count": 5, "bytes": 5 * 128 * 128 * 2, "uncounted": 0}, "start and end are one"
    assert found["all-reduce"] == {"count": 1, "bytes": 40, "uncounted": 0}
    assert found["collective-permute"] == {"count": 1, "bytes": 48, "uncounted": 0}, "what it gives on is not counted"
    assert len(found) == 3


def test_what_a_kernel_says_on_lines_of_its_own_ends_no_computation():
    said = """%kernel = f32[10] custom-call(%y), frontend_attributes={kernel_metadata={
"metadata":"{\\"block\\": 256}"
}}, metadata={op_name="kernel"}
  %sent = """
    text = COUNTED.replace("%sent = ", said)
    assert text != COUNTED and rows(text) == rows(COUNTED)


def test_a_trip_count_that_xla_tells_counts():
    told = PROGRAM.replace("KNOWN", ', backend_config={"known_trip_count":{"n":"3"}}').replace("CONSTANT", "5")
    assert rows(told)["all-gather"]["count"] == 3


@pytest.mark.parametrize(
    "old, new",
    [
        ("compare(%at, %limit), direction=LT", "compare(%at, %limit), direction=NE"),
        ("constant(0)", "parameter(2)"),
        ("add(%at, %one)", "multiply(%at, %one)"),
        ("constant(CONSTANT)", "parameter(1)"),
    ],
)
def test_a_loop_of_which_nothing_tells_the_trips_counts_once_and_is_said(old, new):
    text = PROGRAM.replace(old, new).replace("CONSTANT", "5").replace("KNOWN", "")
    assert rows(text)["all-gather"] == {"count": 1, "bytes": 128 * 128 * 2, "uncounted": 1}


def test_a_counter_that_begins_later_or_grows_faster():
    trips = lambda text: loops.trips(
        (program := hlo.parsed(text)).computations["main"].instructions["loop"], program.computations["main"], program
    )
    assert trips(COUNTED) == 5
    assert trips(COUNTED.replace("constant(0)", "constant(2)")) == 3
    assert trips(COUNTED.replace("%one = s32[] constant(1)", "%one = s32[] constant(2)")) == 3


def test_of_branches_the_dearest_counts():
    text = """\
%cheap (x: f32[8]) -> f32[8] {
  ROOT %x = f32[8] parameter(0)
}

%dear (x: f32[8]) -> f32[8] {
  %x = f32[8] parameter(0)
  ROOT %moved = f32[8] all-to-all(%x), dimensions={0}
}

ENTRY %main (p: pred[], x: f32[8]) -> f32[8] {
  %p = pred[] parameter(0)
  %x = f32[8] parameter(1)
  ROOT %either = f32[8] conditional(%p, %x, %x), branch_computations={%cheap, %dear}
}
"""
    assert rows(text) == {"all-to-all": {"count": 1, "bytes": 32, "uncounted": 0}}
    with pytest.raises(ValueError, match="entry"):
        collectives.of("HloModule nothing")
