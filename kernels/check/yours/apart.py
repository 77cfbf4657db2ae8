"""A file of kernels under check, in a process of its own that cannot say it is right.

`check` makes the rows. A call's arguments lie in memory that both processes see, each
between guards (call.py). Here, where no kernel runs, the results are compared with NumPy's,
the guards and every argument but out with what was written there. What the process
(host.py; within it, inside.py) is asked and does not answer is a failed row: it crashed, it
ended, it took too long.
"""

import time
from contextlib import ExitStack
from functools import partial

from ... import OPS
from ..cases import BEYOND, cases_of
from ..compare import row_of, same_bits
from ..explain import compared
from . import only, operands, require_known
from .call import Call, handed
from .host import LIMIT, Host

PATIENCE = 3.  # seconds that a large case may take in Triton's interpreter
CALLS, SECONDS = 300, .6  # small calls at the end, at most so many, for about so long
COUNTER = {"seed", "sample", "step", "tag", "keys"}


def check(files, ops=None, dtypes=("float32",), seed=0, shapes=None, near=None):
    """Rows as check.check's, one by one: each function of the files, on every case of its
    op.

    shapes: these alone. near: compare.Near, for what is not meant to be equal. ValueError
    in one line where a file cannot be used.
    """
    with ExitStack() as stack:
        names = dict.fromkeys(map(str, files))
        hosts = {file: stack.enter_context(Host(file)) for file in names}
        found = [f for host in hosts.values() for f in host.functions]
        functions = only(found, ops, [*hosts])
        for function in functions:
            if function.arrays == "numpy" and "bfloat16" in dtypes:
                raise ValueError(f"{function.file}: NumPy has no bfloat16; put "
                                 "ARRAYS = 'torch' into it")
        for function in functions:
            host = hosts[function.file]
            yield from check_function(host, function, dtypes, seed, shapes, near)


def check_function(host, function, dtypes, seed, shapes, near):
    """Rows of one function. The first case that its process does not answer is its last."""
    first = next(cases_of(function.op, dtypes, [(1, 1)]))
    try:
        require_known(function, handed(function, first))
    except ValueError as e:
        yield failure(function, first, "", str(e))
        return
    cases = cases_of(function.op, dtypes, shapes, seed, hard=shapes or ())
    if near:  # what overflows, or is NaN, by the order of its terms has no one answer
        cases = (case for case in cases if "special" not in case.note)
    beyond = [] if shapes else cases_of(function.op, dtypes, BEYOND, seed + 1)
    try:
        yield from rows_of_cases(host, function, cases, near)
        yield from rows_of_cases(host, function, beyond, near, large=True)
        for dtype in dtypes if not shapes else ():
            yield many_calls(host, function, dtype, seed, near)
    except Gone as e:
        yield e.row


def rows_of_cases(host, function, cases, near, large=False):
    """Rows of those cases that are a function's. Large ones are called once, and left where
    Triton's interpreter takes too long."""
    limit = PATIENCE if large and host.interpreted else LIMIT
    slow = set()
    for case in cases:
        if not fits(function, case):
            continue
        if case.shape in slow:
            yield not_run(function, case)
            continue
        try:
            for where in places(function):
                yield from rows_of(host, function, case, where, near, limit, once=large)
        except TimeoutError:
            slow.add(case.shape)
            yield not_run(function, case)


def not_run(function, case):
    """A row of what Triton's interpreter would take too long for."""
    shape = ",".join(map(str, case.shape))
    return row_of(function.op, function.label, case.dtype, case.shape, None,
                  f"takes more than {PATIENCE:g} s in Triton's interpreter; check it on a "
                  f"GPU, or --shape {shape}")


def many_calls(host, function, dtype, seed, near):
    """A row of many small calls, each another case: some go wrong after a while."""
    shape = 7, 13
    end = time.monotonic() + SECONDS
    count = 0
    cases = cases_of(function.op, [dtype], [shape] * CALLS, seed + 2)
    for case in filter(partial(fits, function), cases):
        if time.monotonic() > end or count == CALLS:
            break
        count += 1
        for row in rows_of(host, function, case, "", near, LIMIT, once=True):
            if not row["passed"]:
                row["reason"] = f"call {count} of many small ones: {row['reason']}"
                return row
    return row_of(function.op, function.label, dtype, shape, True, f"{count} calls more",
                  within=near and str(near), max_ulp=None)


def fits(function, case):
    """Whether a case is one for a function: by what it asks for."""
    wanted = function.wanted
    has = set(wanted)
    if case.keyed and "keys" not in has:
        return False
    if case.z is not None and ("z" not in has or has & COUNTER):
        return False
    needs = {name for name, optional in wanted.items() if not optional}
    if case.parameters is not None:
        return True
    return "coef" in has and not needs & set(OPS[case.op].tried)


def places(function):
    """Where out is: a buffer of its own, and, where an op has an operand, that array."""
    if "out" not in function.wanted:
        return [""]
    if function.op not in OPS or not operands(function.op):
        return [", out of place"]
    return [", out of place", ", in place"]


# ---- one call ----

def rows_of(host, function, case, where, near, limit, once=False):
    """Rows of a case: called twice, with other guards, it returns the same and harms
    nothing. Gone where it is not answered, TimeoutError where it need not be."""
    failed = partial(failure, function, case, where)
    found = []
    for _ in range(1 if once else 2):
        call = Call(function, case, "in place" in where)
        try:
            found.append(call.results(host, limit))
        except TimeoutError as e:
            if limit < LIMIT:
                raise
            raise Gone(failed(f"{e}{call.damage(host)}")) from e
        except EOFError as e:
            given = ", ".join(call.given)
            raise Gone(failed(f"{e}, called with {given}{call.damage(host)}")) from e
        except RuntimeError as e:
            yield failed(str(e))
            return
    got, more = found[0], found[-1]
    draws = draws_itself(function)
    for row in compared(case, function.label, got, where=where, near=near, draws=draws):
        if draws and not row["passed"] and not COUNTER & set(function.wanted):
            row["explained"] = ("its noise cannot be the counter's: it asks for none of "
                                "seed, sample, step, tag")
        yield row
    if not all(map(same_bits, got, more)):
        yield failed("called again with the same arguments, it returns something else")


def failure(function, case, where, reason):
    """A failed row of a case that has no result to compare."""
    return row_of(function.op, function.label, case.dtype, case.shape, False,
                  f"{case.parts[0]}{where}: {reason}")


def draws_itself(function):
    """Whether a function has noise in it that it is not handed."""
    draws = OPS[function.op].noise if function.op in OPS else function.op != "norms"
    return draws and "z" not in function.wanted


class Gone(Exception):
    """A function's process did not answer. row: the failed row that says so."""

    def __init__(self, row):
        super().__init__(row["reason"])
        self.row = row
