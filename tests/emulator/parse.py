"""The text of a kernel, read: instructions, labels, registers, parameters."""

import re
from functools import cache
from types import SimpleNamespace

from .arithmetic import KINDS


@cache
def parsed(text, kernel):
    """A kernel of a PTX file: its instructions, (guard or None, parts of the name, operands);
    where each label stands; bytes of its registers, by prefix, and of its parameters."""
    found = re.search(rf"\.entry {kernel}\((.*?)\n\{{(.*?)\n\}}", text, re.S)
    if not found:
        raise RuntimeError(f"no kernel {kernel!r} in the PTX")
    head, body = found.groups()
    body = re.sub(r"//.*|/\*.*?\*/|^\s*\.(loc|pragma|file)\b.*$", "", body, flags=re.M)
    code, labels = [], {}
    for statement in body.split(";"):
        while m := re.match(r"\s*(?:[{}]|(\$\w+):)", statement):
            labels[m[1]] = len(code)
            statement = statement[m.end():]
        if statement.strip() and not statement.strip().startswith("."):
            guard, name, rest = re.match(r"\s*(?:@(!?%\w+)\s+)?([\w.:]+)\s*(.*)", statement,
                                         re.S).groups()
            code.append((guard, name.replace("::", ".").split("."), [
                o.strip() for o in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^\s,][^,]*", rest)]))
    return SimpleNamespace(
        code=code, labels={o[0]: labels[o[0]] for _, name, o in code if name[0] == "bra"},
        registers={name: KINDS[kind].itemsize for kind, name in
                   re.findall(r"\.reg \.(\w+)\s+(%[a-z]+)<", body)},
        parameters=[int(bits) // 8 for bits in re.findall(r"\.param \.[a-z](\d+)", head)])
