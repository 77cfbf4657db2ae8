"""A GPU in NumPy: runs the PTX that a kernel was compiled to, an instruction at a time.

How a device rounds is said by the names of the instructions. As much of the language as the
kernels here use; anything else is an error, not a guess. So are addresses outside of the launch's
own tensors or not a multiple of their access, and what one thread stores (in shared memory, one
warp, between barriers) and another touches; within a warp threads keep step. Not exact on a
device is rsqrt.approx alone, here rounded to nearest: the root made of it is sqrt.rn's own
(tests/kernels/test_compile.py).
"""
