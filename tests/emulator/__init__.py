"""A GPU in NumPy: it runs the PTX that a kernel was compiled to, an instruction at a time.

Why. A test of a GPU kernel needs a GPU, and most machines that run tests have none. But
NVRTC and Triton compile without one, and PTX says by the name of each instruction how its
result is rounded: `add.rn.f32` is one rounding to nearest, `fma.rn.f32` is one where `mul`
and `add` are two. So what a device would return can be computed bit by bit from the
compiled text. That sees what no reading of the source sees: what the compiler contracted,
reordered, or replaced by something quicker.

How. A launch is a grid of blocks of threads. A register is a NumPy array with one value a
thread, so an instruction is one NumPy call for all threads that are at it. Where threads
part at a branch, those who are behind go first, until they stand together again. Without
shared memory all warps of a block move as one; with it each warp runs to the next barrier
on its own.

    parse.py       the text: instructions, labels, registers, parameters
    arithmetic.py  what an instruction computes, rounded as its name says
    warps.py       threads: who is where, and what an instruction does to their registers
    memory.py      the launch's own arrays, and who touched what since a barrier
    unknown.py     what is said of a line that none of these knows
    launch.py      a launch; and `triton` and `cupy`, made to compile for sm_90 and run here

What is refused. Only as much of the language is written as the kernels here use. Any other
instruction, modifier, operand or directive is a NotImplementedError, not a guess: `add.f32`,
which a compiler may contract, as well as `sin.approx`. It names the line, the kernel, the
compiler and what to do: a Triton that is not out yet may write what none did before. What a
device might do without a word is a RuntimeError:
- an address outside of the launch's own tensors, or not a multiple of what is read there;
- a race: what one thread stores and another touches, before a barrier or in another block
  (in shared memory it is warps that race: within a warp, threads keep step);
- a barrier that not every warp comes to, or threads that wait for each other for ever;
- arguments that are not as many, or as wide, as the kernel's parameters.

A register that was never written holds a NaN.

What is not exact. `rsqrt.approx` alone: a device's may be two units in the last place off,
and here it is rounded to nearest. The kernels mend it by two fused multiply-adds to the
correctly rounded root, from whichever of its neighbours it starts (test_ptx.py); and these
are the machine's own steps for `sqrt.rn` (tests/kernels/test_compile.py). Time, caches and
the order of atomic additions are a device's own: nothing is said of them.

In a test. Take `place`, or `cupy_here`, from tests/conftest.py, and call the backend as
ever, with CPU tensors: what NVRTC compiles is run here. Triton compiles only outside its
interpreter, so in another process: `launch.emulate()`, as tests/kernels/test_compile.py
does. PTX of one's own:

    from emulator import launch
    launch.run(text, "kernel", (tensor, 7), blocks, threads, shared_bytes)

where `blocks` are the numbers of the blocks that run, range(n) for all of a grid. An update
with noise takes some 8 ms for a few elements, 10 ms for 600 and 70 ms for 65,536: let one
launch hold many rows rather than many launches one.
"""
