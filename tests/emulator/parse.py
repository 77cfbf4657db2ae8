"""The text of a kernel, read: instructions, labels, registers, parameters."""

import re
from functools import cache
from types import SimpleNamespace

from .arithmetic import KINDS
from .unknown import compiler, unknown

# a space's long name in a kernel, and the short one that PTX takes for it
SHORT = {"shared::cta": "shared", "param::entry": "param"}
# what a kernel may say of itself that changes no result
HINTS = ".maxntid", ".reqntid", ".minnctapersm", ".maxnreg"


@cache
def parsed(text, kernel):
    """A kernel of a PTX file: its instructions, (guard or None, parts of the name, operands,
    line); where each label stands; bytes of its registers, by prefix, and of its parameters.
    NotImplementedError for a line of another form."""
    found = re.search(rf"\.entry {kernel}\((.*?)\n\{{(.*?)\n\}}", text, re.S)
    if not found:
        raise RuntimeError(f"no kernel {kernel!r} in the PTX of {compiler(text)}")
    head, body = found.groups()
    body = re.sub(r"//.*|/\*.*?\*/|^\s*\.(loc|pragma|file)\b.*$", "", body, flags=re.M)
    program = SimpleNamespace(kernel=kernel, compiler=compiler(text), code=[], labels={},
                              registers={}, parameters=[])
    for line in re.split(r"[,)\n]", head):
        if line.strip().startswith("."):
            read_head(" ".join(line.split()), program)
    for statement in body.split(";"):
        while m := re.match(r"\s*(?:[{}]|(\$\w+):)", statement):
            program.labels[m[1]] = len(program.code)
            statement = statement[m.end():]
        if line := " ".join(statement.split()):
            read(line, program)
    for _, name, operands, line in program.code:
        if name[0] == "bra" and not (operands and operands[0] in program.labels):
            raise unknown(line, program, "parse.py", "no such label")
    return program


def read_head(line, program):
    """A parameter, or what a kernel says of itself."""
    parameter = re.fullmatch(r"\.param \.[a-z](\d+)[^\[]*", line)
    if parameter:
        program.parameters.append(int(parameter[1]) // 8)
    elif line.split()[0] not in HINTS:
        raise unknown(line, program, "parse.py")


def read(line, program):
    """A declaration of registers, or an instruction."""
    registers = re.fullmatch(r"\.reg \.(\w+) (.*)", line)
    instruction = re.fullmatch(r"(?:@(!?%\w+) )?([a-z][\w.:]*)(?: (.*))?", line)
    if registers and registers[1] in KINDS:
        size = KINDS[registers[1]].itemsize
        program.registers |= dict.fromkeys(re.findall("(%[a-z]+)<", registers[2]), size)
    elif instruction:
        guard, name, rest = instruction.groups()
        operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^\s,][^,]*", rest or "")
        program.code.append((guard, [SHORT.get(part, part) for part in name.split(".")],
                             [o.strip() for o in operands], f"{line};"))
    else:
        raise unknown(f"{line};", program, "parse.py")
