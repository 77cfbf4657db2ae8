"""The GPU in NumPy against Python's integers, libm and what a device must refuse."""

import ctypes
import ctypes.util

import numpy as np
import pytest
import torch

from minidiff.bench import ptx

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


def run(body, given=(), blocks=1, threads=32, shared=64):
    """The threads' words, in place, after `body` with the word's address in %rd2."""
    words = np.resize(np.asarray([*given] or [0], np.uint32), blocks * threads)
    tensor = torch.from_numpy(words.view(np.int32))
    ptx.run(f"{HEAD}{body}\n    ret;\n}}", "kernel", (tensor, 7), range(blocks), threads, shared)
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


def test_fma_rounds_once():
    libm = ctypes.CDLL(ctypes.util.find_library("m"))
    libm.fmaf.argtypes, libm.fmaf.restype = [ctypes.c_float] * 3, ctypes.c_float
    rng = np.random.default_rng(0)
    a, b, c = rng.standard_normal((3, 20_000), np.float32)
    c[::2] = -(a * b)[::2] * (1 + rng.integers(-2, 3, 10_000) * np.float32(2)**-23)
    c[::3] *= np.float32(2)**-24  # half a unit beside the product
    got = ptx.fma(a, b, c)
    want = np.array([libm.fmaf(*v) for v in zip(a, b, c)], np.float32)
    assert (got.view(np.int32) == want.view(np.int32)).all()
    assert (want != a * b + c).mean() > .1


def test_16_bits_round_as_torch_rounds():
    f = np.arange(0, 2**32, 65_537 // 4, dtype=np.uint32).view(np.float32)
    f = f[~np.isnan(f)]
    got = ptx.convert(f, "bf16", "f32")
    assert (got == torch.from_numpy(f).bfloat16().view(torch.int16).numpy().view(np.uint16)).all()
    back = ptx.convert(got, "f32", "bf16")
    assert (back == torch.from_numpy(f).bfloat16().float().numpy()).all()
    with np.errstate(over="ignore"):
        assert (ptx.convert(f, "f16", "f32") == torch.from_numpy(f).half().numpy()).all()


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
    got = run(NEIGHBOUR.replace("bar.sync 0;", ""), threads=64, shared=256)
    assert (got != want).any()


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
    ("mov.u32 %r2, 64; st.shared.u32 [%r2], %r1;", "beyond"),
    ("add.ftz.f32 %f2, %f1, %f1;", "add.ftz.f32"), ("sin.approx.f32 %f2, %f1;", "sin"),
    ("min.f32 %f2, %f1, %f1;", "min.f32"),
    ("setp.eq.u32 %p1, %r1, 3; @%p1 bra $OUT; bar.sync 0; $OUT: mov.u32 %r2, 0;", "for ever"),
    ("setp.eq.u32 %p1, %r1, 3; @%p1 ret; shfl.sync.bfly.b32 %r4, %r1, 1, 31, -1;", "for ever")])
def test_what_a_device_would_not_do_is_an_error(body, error):
    with pytest.raises(Exception, match=error.replace(".", r"\.")):
        run(body)
