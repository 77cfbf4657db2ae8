"""The GPU in NumPy against Python's integers, libm and what a device must refuse."""

import ctypes
import ctypes.util
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from emulator import arithmetic, launch, unknown
from minidiff import noise
from minidiff.kernels import on_triton

HEAD = """
.visible .entry kernel(
    .param .u64 kernel_param_0,
    .param .u32 kernel_param_1
)
{
    .reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<99>; .reg .f32 %f<99>;
    .reg .b64 %rd<99>;
    ld.param.u64 %rd1, [kernel_param_0];
    mov.u32 %r1, %tid.x;
    mad.wide.u32 %rd2, %r1, 4, %rd1;
"""
EXACT = np.array([0, 1, 2, 3, 31, 32, 33, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1], np.uint32)


def run(body, given=(), blocks=1, threads=32, shared=256):
    """The threads' words, in place, after `body` with the word's address in %rd2."""
    words = np.resize(np.asarray([*given] or [0], np.uint32), blocks * threads)
    tensor = torch.from_numpy(words.view(np.int32))
    launch.run(f"{HEAD}{body}\n    ret;\n}}", "kernel", (tensor, 7), range(blocks), threads, shared)
    return words


def signed(n, bits=32):
    return (int(n) + 2**(bits - 1)) % 2**bits - 2**(bits - 1)


@pytest.mark.parametrize("instruction, want", [
    ("add.s32 %r3, %r2, 5;", lambda a: a + 5), ("sub.s32 %r3, 5, %r2;", lambda a: 5 - a),
    ("mul.lo.s32 %r3, %r2, -3;", lambda a: -3 * a), ("neg.s32 %r3, %r2;", lambda a: -a),
    ("mul.hi.u32 %r3, %r2, 0xD2511F53;", lambda a: a * 0xD2511F53 >> 32),
    ("mul.wide.u32 %rd3, %r2, %r2; shr.u64 %rd4, %rd3, 32; cvt.u32.u64 %r3, %rd4;",
     lambda a: a * a >> 32),
    ("mul.wide.s32 %rd3, %r2, 3; shr.s64 %rd4, %rd3, 32; cvt.u32.u64 %r3, %rd4;",
     lambda a: 3 * signed(a) >> 32),
    ("cvt.s64.s32 %rd3, %r2; mad.lo.s64 %rd4, %rd3, %rd3, 1; cvt.u32.u64 %r3, %rd4;",
     lambda a: a * a + 1),
    ("shl.b32 %r3, 3, %r2;", lambda a: 3 << min(a, 32)),
    ("shr.u32 %r3, 0x80000000, %r2;", lambda a: 2**31 >> min(a, 32)),
    ("shr.s32 %r3, 0x80000000, %r2;", lambda a: -2**31 >> min(a, 32)),
    ("div.s32 %r3, %r2, 7;", lambda a: int(signed(a) / 7)),
    ("div.u32 %r3, %r2, 7; rem.u32 %r4, %r2, 7; mad.lo.u32 %r3, %r3, 7, %r4;", lambda a: a),
    ("rem.u32 %r3, %r2, 7;", lambda a: a % 7),
    ("min.s32 %r3, %r2, 40;", lambda a: min(signed(a), 40)),
    ("and.b32 %r4, %r2, 0xFF; or.b32 %r4, %r4, 0x100; xor.b32 %r4, %r4, -1; not.b32 %r3, %r4;",
     lambda a: a & 255 | 256),
    ("bfe.u32 %r3, %r2, 4, 9;", lambda a: a >> 4 & 511),
    ("bfe.s32 %r3, %r2, 0, 8;", lambda a: signed(a & 255, 8)),
    ("bfe.u32 %r3, %r2, 24, 16;", lambda a: a >> 24),
    ("bfe.s32 %r3, %r2, 24, 16;", lambda a: signed(a) >> 24),
    ("st.global.u32 [%rd2], -1; ld.global.u32 %r3, [%rd2];", lambda a: -1),
    ("cvt.u64.u32 %rd3, %r2; cvt.s64.s32 %rd3, %rd3; shr.u64 %rd3, %rd3, 32; cvt.u32.u64 %r3, "
     "%rd3;", lambda a: -(a >> 31)),
    ("shl.b32 %r6, %r1, 3; st.shared.v2.u32 [%r6], {%r2, 9}; ld.shared.v2.u32 {%r4, %r5}, [%r6]; "
     "add.s32 %r3, %r4, %r5;", lambda a: a + 9),
    ("cvt.u64.u32 %rd3, %r2; bfi.b64 %rd4, %rd3, -1, 8, 16; cvt.u32.u64 %r3, %rd4;",
     lambda a: (2**32 - 1) & ~0xFFFF00 | (a & 0xFFFF) << 8),
    ("prmt.b32 %r3, %r2, 0x11223344, 0x4AF0;",
     lambda a: a & 255 | 0 << 8 | (255 if a >> 23 & 1 else 0) << 16 | 0x44 << 24),
    ("mov.b32 {%rs1, %rs2}, %r2; mov.b32 %r3, {%rs2, %rs1};", lambda a: a >> 16 | a << 16),
    ("setp.lt.s32 %p1, %r2, 3; selp.b32 %r3, 10, 20, %p1;", lambda a: 10 if signed(a) < 3 else 20),
    ("mov.u32 %r3, 1; setp.gt.u32 %p1, %r2, 3; @%p1 mov.u32 %r3, 2; @!%p1 add.s32 %r3, %r3, 8;",
     lambda a: 2 if a > 3 else 9),
    ("ld.param.u32 %r4, [kernel_param_1]; add.s32 %r3, %r2, %r4;", lambda a: a + 7)])
def test_integers(instruction, want):
    instruction = f"ld.global.u32 %r2, [%rd2]; {instruction} st.global.u32 [%rd2], %r3;"
    got = run(instruction, EXACT)
    assert [int(v) for v in got[:len(EXACT)]] == [want(int(a)) % 2**32 for a in EXACT]


@pytest.mark.parametrize("compare, want", [
    ("eq", [1, 0, 0, 0]), ("ne", [0, 1, 1, 0]), ("lt", [0, 1, 0, 0]), ("ge", [1, 0, 1, 0])])
def test_comparisons_of_floats_are_ordered(compare, want):
    given = np.array([1., 0., np.inf, np.nan], np.float32).view(np.uint32)
    got = run(f"""ld.global.f32 %f1, [%rd2]; setp.{compare}.f32 %p1, %f1, 0f3F800000;
                  selp.b32 %r3, 1, 0, %p1; st.global.u32 [%rd2], %r3;""", given)
    assert [*got[:4]] == want


@np.errstate(over="ignore")
def test_floats():
    given = np.array([1.5, -0., 1e-40, 3e38, -np.inf, .1, 65_519, 2**-25], np.float32)
    body = "ld.global.f32 %f1, [%rd2]; {} st.global.f32 [%rd2], %f3;"
    for instruction, want in (
            ("mul.rn.f32 %f3, %f1, 0f3F000000;", given * np.float32(.5)),
            ("sub.rn.f32 %f2, 0f3F800000, %f1; neg.f32 %f3, %f2;", -(1 - given)),
            ("cvt.rn.f16x2.f32 %r3, %f1, %f1; mov.b32 {%rs1, %rs2}, %r3; cvt.f32.f16 %f3, %rs2;",
             given.astype(np.float16).astype(np.float32)),
            ("cvt.rn.bf16x2.f32 %r3, %f1, 0; mov.b32 {%rs1, %rs2}, %r3; cvt.f32.bf16 %f3, %rs2;",
             torch.from_numpy(given).bfloat16().float().numpy())):
        got = run(body.format(instruction), given.view(np.uint32))[:8].view(np.float32)
        assert (got == want).all(), (instruction, got, want)
    with np.errstate(divide="ignore"):
        assert [*arithmetic.rsqrt(np.array([1e-40, 4, np.inf], np.float32))] == [np.inf, .5, 0]


def test_threads_add_to_one_place_in_turn():
    sums = torch.zeros(1, dtype=torch.float64)
    launch.run(HEAD + """cvt.rn.f32.u32 %f1, %r1; cvt.f64.f32 %rd3, %f1;
        atom.global.add.f64 %rd4, [%rd1], %rd3; ret;\n}""", "kernel", (sums, 7), range(2), 64)
    assert sums.item() == 2 * 64 * 63 / 2


def test_matrices_go_to_shared_memory_and_back():
    """Thread t holds of a matrix the elements 2 (t mod 4) and the next of row t div 4; rows of
    16 bytes are where the threads say, here in turn."""
    place = "shl.b32 %r3, %r1, 4; mov.u32 %r4, global_smem; add.s32 %r3, %r3, %r4;"
    body = place + """
        mad.lo.u32 %r5, %r1, 4, 0; add.s32 %r6, %r5, 1; add.s32 %r7, %r5, 2; add.s32 %r8, %r5, 3;
        stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r3], {%r5, %r6, %r7, %r8};
        shl.b32 %r9, %r1, 2; ld.shared.u32 %r10, [%r9+256]; st.global.u32 [%rd2], %r10;"""
    assert (run(body, shared=512) == 4 * np.arange(32) + 2).all()  # the third matrix, row by row
    body = place + """
        st.shared.v4.u32 [%r3], {%r1, %r1, %r1, %r1};
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r5, %r6, %r7, %r8}, [%r3];
        st.global.u32 [%rd2], %r6;"""
    assert (run(body, shared=512) == 8 + np.arange(32) // 4).all()
    column, row = np.divmod(np.arange(32), 4)  # transposed: two neighbours of a column
    low = np.where(column % 2, 0, 8 + 2 * row)
    assert (run(body.replace("x4.shared", "x4.trans.shared"), shared=512)
            == low + (np.where(column % 2, 0, 9 + 2 * row) << 16)).all()


SHARED = """
    shl.b32 %r3, %r1, 4; mov.u32 %r4, global_smem; add.s32 %r3, %r3, %r4;
    st.shared.v4.b32 [ %r3 + 0 ], { %r1, %r1, %r1, %r1 };
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r5, %r6, %r7, %r8}, [%r3];
    stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r3], {%r8, %r7, %r6, %r5};
    ld.shared.b32 %r9, [%r3+4]; ld.param.u32 %r10, [kernel_param_1];
    add.s32 %r9, %r9, %r10; st.global.u32 [%rd2], %r9;"""


def test_a_space_has_two_spellings():
    """In PTX .shared is .shared::cta, a block's own, and .param in a kernel .param::entry."""
    want = run(SHARED, shared=512)
    assert (want == 31 - np.arange(32) // 8 * 8 - (7 - np.arange(32) % 8) + 7).all()
    for plain in ("st.shared", "ld.shared", "x4.shared", "ld.param"):
        space = plain.split(".")[1]
        own, other = {"shared": ("cta", "cluster"), "param": ("entry", "func")}[space]
        assert (run(SHARED.replace(plain, f"{plain}::{own}"), shared=512) == want).all()
        with pytest.raises(NotImplementedError, match=f"{plain}::{other}.* is not written"):
            run(SHARED.replace(plain, f"{plain}::{other}"), shared=512)


def test_fma_rounds_once():
    libm = ctypes.CDLL(ctypes.util.find_library("m"))
    libm.fmaf.argtypes, libm.fmaf.restype = [ctypes.c_float] * 3, ctypes.c_float
    rng = np.random.default_rng(0)
    a, b, c = rng.standard_normal((3, 20_000), np.float32)
    a[1::400], c[3::400] = -np.inf, np.inf
    c[::2] = -(a * b)[::2] * (1 + rng.integers(-2, 3, 10_000) * np.float32(2)**-23)
    c[::3] *= np.float32(2)**-24  # half a unit beside the product
    with np.errstate(invalid="ignore"):
        got = arithmetic.fma(a, b, c)
    want = np.array([libm.fmaf(*v) for v in zip(a, b, c)], np.float32)
    assert (got.view(np.int32) == want.view(np.int32)).all()
    assert (want != a * b + c).mean() > .1


def test_the_root_is_right_for_a_device_s_rsqrt_of_one_unit_more_or_less():
    """The kernels' five instructions, at a million radii."""
    v = noise.radius(np.random.default_rng(1).integers(0, 2**32, 1_000_000, np.uint32))**2
    for off in (-1, 0, 1):
        y = (arithmetic.rsqrt(v).view(np.int32) + np.int32(off)).view(np.float32)
        s, h = v * y, y * np.float32(.5)
        assert (arithmetic.fma(arithmetic.fma(-s, s, v), h, s) == np.sqrt(v)).all(), off


def test_16_bits_round_as_torch_rounds():
    f = np.arange(0, 2**32, 65_537 // 4, dtype=np.uint32).view(np.float32)
    f = f[~np.isnan(f)]
    got = arithmetic.convert(f, "bf16", "f32")
    assert (got == torch.from_numpy(f).bfloat16().view(torch.int16).numpy().view(np.uint16)).all()
    back = arithmetic.convert(got, "f32", "bf16")
    assert (back == torch.from_numpy(f).bfloat16().float().numpy()).all()
    with np.errstate(over="ignore"):
        assert (arithmetic.convert(f, "f16", "f32") == torch.from_numpy(f).half().numpy()).all()


NEIGHBOUR = """
    shl.b32 %r3, %r1, 2; mov.u32 %r4, global_smem; add.s32 %r5, %r4, %r3;
    st.shared.u32 [%r5], %r1;
    bar.sync 0;
    xor.b32 %r6, %r5, 128;
    ld.shared.u32 %r7, [%r6]; st.global.u32 [%rd2], %r7;"""


def test_a_barrier_and_its_lack():
    """Two warps that read each other's words."""
    want = np.arange(64, dtype=np.uint32) ^ 32
    assert (run(NEIGHBOUR, threads=64, shared=256) == want).all()
    for lack in ("", "bar.arrive 0, 64;", "bar.warp.sync -1;"):
        with pytest.raises(RuntimeError, match="race" if not lack else "not written"):
            run(NEIGHBOUR.replace("bar.sync 0;", lack), threads=64, shared=256)


def test_warps_may_store_the_same_in_shared_memory():
    """As Triton's sums across warps do; not in global memory, and not two values."""
    body = "mov.u32 %r4, global_smem; st.shared.u32 [%r4], {}; bar.sync 0; ld.shared.u32 %r7, " \
        "[%r4]; st.global.u32 [%rd2], %r7;"
    assert (run(body.format(5), threads=64, shared=256) == 5).all()
    with pytest.raises(RuntimeError, match="race"):
        run(body.format("%r1"), threads=64, shared=256)


def test_threads_that_part_meet_again_before_they_shuffle():
    """A loop of as many rounds as a thread's number, its body behind the shuffle."""
    got = run("""
        mov.u32 %r3, 0; mov.u32 %r5, -1;
        $AGAIN: setp.lt.u32 %p1, %r3, %r1; @%p1 bra $MORE;
        shfl.sync.bfly.b32 %r4|%p2, %r3, 1, 31, %r5;
        st.global.u32 [%rd2], %r4; ret;
        $MORE: add.s32 %r3, %r3, 1; bra.uni $AGAIN;""")
    assert (got == np.arange(32) ^ 1).all()


@pytest.mark.parametrize("body, error", [
    ("st.global.u32 [%rd2+4], %r1;", "outside"), ("ld.global.u32 %r2, [%rd2+-4];", "outside"),
    ("ld.global.u32 %r2, [%rd2+2];", "not aligned"),
    ("ld.global.v4.u32 {%r2, %r3, %r4, %r5}, [%rd2];", "not aligned"),
    ("mov.u32 %r2, 256; st.shared.u32 [%r2], %r1;", "outside of the block's"),
    ("mov.u32 %r2, 0; ld.shared.u32 %r3, [%r2+-4];", "outside of the block's"),
    ("st.global.u32 [%rd1], %r1;", "race"), ("st.global.u32 [%rd1], 5;", "race"),
    ("ld.global.u32 %r2, [%rd1]; st.global.u32 [%rd2], %r2;", "race"),
    ("ld.global.u64 %rd3, [%rd1]; atom.global.add.f64 %rd4, [%rd1], %rd3;", "race"),
    ("setp.eq.u32 %p1, %r1, 3; @%p1 bra $OUT; bar.sync 0; $OUT: mov.u32 %r2, 0;", "for ever"),
    ("setp.eq.u32 %p1, %r1, 3; @%p1 ret; shfl.sync.bfly.b32 %r4, %r1, 1, 31, -1;", "for ever"),
    ("setp.eq.u32 %p1, %r1, 3; @%p1 shfl.sync.bfly.b32 %r4, %r1, 1, 31, -1;", "guarded"),
    ("shfl.sync.bfly.b32 %r4, %r1, 1, 31, 15;", "not written"),
    ("ld.param.u64 %rd3, [kernel_param_1];", "4 bytes")])
def test_what_a_device_would_not_do_is_an_error(body, error):
    with pytest.raises(RuntimeError, match=error):
        run(body)


@pytest.mark.parametrize("instruction", [
    "add.f32 %f2, %f1, %f1", "mul.f32 %f2, %f1, %f1", "add.ftz.f32 %f2, %f1, %f1",
    "add.rz.f32 %f2, %f1, %f1", "fma.f32 %f2, %f1, %f1, %f1", "mul.lo.f32 %f2, %f1, %f1",
    "sin.approx.f32 %f2, %f1", "min.f32 %f2, %f1, %f1", "rsqrt.approx.f32 %f2, %f1",
    "setp.lt.and.u32 %p1, %r1, 3, %p2", "setp.eq.u32 %p1|%p2, %r1, 3", "mov.u32 %r2, %laneid",
    "div.u64 %rd3, %rd2, 3", "ld.global.nc.u32 %r2, [%rd2]", "ld.global.cs.u32 %r2, [%rd2]",
    "ld.volatile.global.u32 %r2, [%rd2]", "cvt.rz.f16.f32 %rs1, %f1", "cvt.sat.f32.f16 %f1, %rs1",
    "cvt.rn.relu.bf16.f32 %rs1, %f1", "cvt.f16.f32 %rs1, %f1", "add.s32 %r2, %rd1, 1",
    "bar.sync 0, 32", "bar.red.popc.u32 %r2, 0, %p1", "atom.global.add.f32 %f1, [%rd2], %f1",
    "add.sat.s32 %r2, %r1, %r1", "membar.gl"])
def test_what_is_not_written_is_an_error(instruction):
    """What rounds otherwise, what a compiler may contract, and what no kernel here needs."""
    with pytest.raises(RuntimeError, match=instruction.split()[0].replace(".", r"\.")):
        run(instruction + ";", shared=256)


MADE_UP = """//
// Generated by LLVM NVPTX Back-End
//
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .u32 kernel_param_1
)
.reqntid 32
{
	.reg .pred 	%p<9>;
	.reg .b32 	%r<9>;
	setp.eq.s32 	%p1, 0, 0;
$AGAIN:
	@!%p1 bra 	$AGAIN;
	@%p1 ld.param.b32 	%r1, [kernel_param_1]; // the end
	ret;
}
"""


@pytest.mark.parametrize("known, other, line, file", [
    ("@%p1 ld.param", "swirl.all", "swirl.all.b32 %r1, [kernel_param_1];", "warps.py"),
    ("ld.param", "ld.param.eager", "@%p1 ld.param.eager.b32 %r1, [kernel_param_1];", "warps.py"),
    ("param.b32", "param.b36", "@%p1 ld.param.b36 %r1, [kernel_param_1];", "warps.py"),
    ("param_1]", "param_1 : 4]", "@%p1 ld.param.b32 %r1, [kernel_param_1 : 4];", "warps.py"),
    ("%r1, ", "%odd.x, ", "@%p1 ld.param.b32 %odd.x, [kernel_param_1];", "warps.py"),
    ("%r1, ", "%r1, 5, ", "@%p1 ld.param.b32 %r1, 5, [kernel_param_1];", "warps.py"),
    ("ret;", "ret.late;", "ret.late;", "warps.py"),
    ("setp.eq.s32", "setp.near.s32", "setp.near.s32 %p1, 0, 0;", "warps.py"),
    ("0, 0;", "0, 0, 0;", "setp.eq.s32 %p1, 0, 0, 0;", "warps.py"),
    ("0, 0;", "%warp.x, 0;", "setp.eq.s32 %p1, %warp.x, 0;", "warps.py"),
    ("@%p1", "@%r1 @%p1", "@%r1 @%p1 ld.param.b32 %r1, [kernel_param_1];", "parse.py"),
    ("bra 	$AGAIN", "bra 	$END", "@!%p1 bra $END;", "parse.py"),
    (".reg .pred 	", ".reg .b36 	", ".reg .b36 %p<9>;", "parse.py"),
    ("ret;", ".local .b8 \tdepot[8]; ret;", ".local .b8 depot[8];", "parse.py"),
    (".reqntid 32", ".swirled 32", ".swirled 32", "parse.py"),
    (".u32 kernel_param_1", ".align 8 .b8 kernel_param_1[8]",
     ".param .align 8 .b8 kernel_param_1[8]", "parse.py")])
def test_an_unknown_line_is_named_with_what_to_do(monkeypatch, known, other, line, file):
    """As the next Triton may write it: the line, the kernel, the Triton, and the way out."""
    monkeypatch.setattr(on_triton, "triton", SimpleNamespace(__version__="3.99.1"))
    arguments = torch.zeros(1), 7
    launch.run(MADE_UP, "kernel", arguments, range(1), 32)
    with pytest.raises(NotImplementedError) as error:
        launch.run(MADE_UP.replace(known, other), "kernel", arguments, range(1), 32)
    said, end = str(error.value), "3.6.0, 3.7.1, 3.8.0, 3.9.0"
    assert said.startswith(f"{line} is not written in tests/emulator/{file}"), said
    assert said.endswith(": it is in kernel 'kernel' of Triton 3.99.1. Write it there, or test "
                         f"with a Triton that is known: {end}") and "\n" not in said, said


def test_the_gate_runs_the_tritons_that_are_known():
    """The older ones by number, the newest in the suite; setup.py admits them alone."""
    root = Path(__file__).parents[2]
    older = " ".join(unknown.KNOWN[:-1])
    assert f"for version in {older}; do" in (root / ".ci" / "run").read_text()
    setup = (root / "setup.py").read_text()
    first, end = re.search(r'"triton>=3\.(\d+),<3\.(\d+);', setup).groups()
    minors = [int(version.split(".")[1]) for version in unknown.KNOWN]
    assert minors == [*range(int(first), int(end))]


@pytest.mark.parametrize("write", ["@%p1 mov.u32 %r3, 5;", "@%p1 ld.global.u32 %r3, [%rd2];"])
def test_what_was_never_written_is_a_nan(write):
    """Also a register that other threads wrote."""
    got = run(f"setp.eq.u32 %p1, %r1, 3; {write} st.global.u32 [%rd2], %r3;", [5])
    assert [*got] == [2**32 - 1] * 3 + [5] + [2**32 - 1] * 28


def test_arguments_are_held_to_the_parameters():
    words = torch.zeros(32, dtype=torch.int32)
    for arguments in ((words,), (words, 7, 7), (words, ctypes.c_int64(7)),
                      (words, ctypes.c_int16(7))):
        with pytest.raises(RuntimeError, match="argument"):
            launch.run(f"{HEAD}ret;\n}}", "kernel", arguments, range(1), 32)
