"""C++ source to a loaded library, compiled once a machine and kept in a cache.

A library is kept under a name of two digests. The first is of all that it came from:
source, compiler, its version, flags and processor. The second is of its own bytes. They are
compared before it is loaded, so that a damaged library is compiled again: the system would
load it, and return other bits or end the process.

What is loaded runs as whoever loads it. So the cache is a folder that its user owns and no
other can write to, or else a folder of this process alone.
"""

import atexit
import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

from ..files import flush
from .backends import warn
from .launch import NotCompiled


class TooSlow(NotCompiled):
    """A compiler took more than LIMIT seconds."""


LIMIT = 180  # seconds that a compiler may take: one to three are usual
PART = "part-"  # begins the name of a folder in which something is being compiled


def compiler():
    """The C++ compiler, the words of its command: $CXX, else c++, g++ or clang++.

    NotCompiled where there is none. What $CXX asks for is not replaced by another.
    """
    asked = os.environ.get("CXX", "").strip()
    if asked:
        try:
            first, *flags = [asked] if shutil.which(asked) else shlex.split(asked)
        except ValueError as e:
            raise NotCompiled(f"CXX={asked}: {e}") from None
        if not shutil.which(first):
            raise NotCompiled(f"CXX={asked}: {first} is not found")
        return [shutil.which(first), *flags]
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return [path]
    raise NotCompiled("no C++ compiler found: install g++ or clang++, or set CXX")


def finished(command, given=""):
    """What a compiler says that was given this text, when it has ended well.

    It runs in a session of its own, which Ctrl-C does not reach: whether to stop is ours,
    and all that it started ends with it. NotCompiled, in one line, where it fails or takes
    more than LIMIT seconds.
    """
    name = Path(command[0]).name
    try:
        process = subprocess.Popen(
            command, text=True, errors="replace", stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    except OSError as e:
        raise NotCompiled(f"{command[0]} cannot be run: {e.strerror}") from e
    try:
        said, _ = process.communicate(given, timeout=LIMIT)
    except BaseException as e:
        end(process)
        if isinstance(e, subprocess.TimeoutExpired):
            raise TooSlow(f"{name} took more than {LIMIT} seconds") from None
        raise
    if process.returncode:
        raise NotCompiled(f"{name} failed: {reason(said, process.returncode)}")
    return said


def end(process):
    """Kill a process and, where sessions are, all that it started; wait for it."""
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.communicate()


def reason(said, code):
    """The line of a compiler's words that says why it failed, else how it ended."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    if not lines:
        return f"exit status {code}"
    return (errors or lines[-1:])[0][:200]


@cache
def version(command):
    """What a compiler, the words of its command, says of itself."""
    return finished([*command, "--version"])


@cache
def cpu():
    """What -march=native means here."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    found = re.search("(?m)^(flags|Features).*", text)
    return found[0] if found else platform.processor()


# ---- where libraries are kept ----

@cache
def folder():
    """$XDG_CACHE_HOME/minidiff, by default ~/.cache/minidiff.

    Where that cannot be trusted or used a folder of this process, and a warning that says
    why: then each process compiles anew.
    """
    try:
        kept = caches() / "minidiff"
        kept.mkdir(mode=0o700, parents=True, exist_ok=True)
        require_own(kept)
        return kept
    except (OSError, RuntimeError) as e:  # no home is a RuntimeError
        why = f"no libraries can be kept ({e})"
    try:
        private = Path(tempfile.mkdtemp(prefix="minidiff-"))
        atexit.register(remove, private, os.getpid())
        require_own(private)
    except OSError as e:
        raise NotCompiled(f"{why}, nor made for this process ({e})") from None
    warn(f"{why}: this process compiles its own; set XDG_CACHE_HOME to a folder of yours")
    return private


def remove(private, process):
    """Take a process's own folder away; not in a process forked from it, which uses it."""
    if os.getpid() == process:
        shutil.rmtree(private, ignore_errors=True)


def caches():
    """The folder that holds this user's caches; a relative $XDG_CACHE_HOME is ignored."""
    home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return home if home.is_absolute() else Path.home() / ".cache"


def require_own(kept):
    """OSError unless this user alone can write to a folder, and run what is there.

    Nor may others put another folder in its place: those above it are the user's or the
    system's, and who may write to them may not rename what is not theirs.
    """
    found = kept.lstat()
    if stat.S_ISLNK(found.st_mode):
        raise OSError(f"{kept} is a link")
    if hasattr(os, "getuid"):
        if found.st_uid != os.getuid():
            raise OSError(f"{kept} belongs to another user")
        if found.st_mode & 0o022:
            raise OSError(f"{kept} can be written by other users")
        for above in kept.resolve().parents:
            mode, owner = above.stat().st_mode, above.stat().st_uid
            if owner not in (0, os.getuid()) or mode & 0o002 and not mode & stat.S_ISVTX:
                raise OSError(f"{above} can be written by other users")
        if found.st_mode & 0o077:
            kept.chmod(0o700)
    if hasattr(os, "ST_NOEXEC") and os.statvfs(kept).f_flag & os.ST_NOEXEC:
        raise OSError(f"{kept} is on a file system from which nothing is run (noexec)")
    tempfile.TemporaryFile(dir=kept).close()


def clear(kept):
    """Take away what compilations that were killed have left."""
    for part in kept.glob(f"{PART}*"):
        with suppress(OSError):  # another process was first
            if time.time() - part.stat().st_mtime > 2 * LIMIT:
                shutil.rmtree(part)


def digest(data):
    """The first 96 bits of SHA-256, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()[:24]


# ---- a library ----

def library(source, *flags):
    """C++ source, compiled with these flags unless it was before, and loaded.

    NotCompiled, in one line, where that is not possible.
    """
    command = (*compiler(), *flags)
    came_from = (source, *command, version((*compiler(),)), cpu())
    key = digest("\0".join(came_from).encode())
    try:
        found = whole_one(key)
        if found:
            with suppress(OSError):  # of a home that several machines share, for another
                return ctypes.CDLL(str(found))
        return ctypes.CDLL(str(built(key, source, command)))
    except OSError as e:
        raise NotCompiled(f"kernels.cu could not be built or loaded: {e}") from e


def whole_one(key):
    """The file kept for a key if its bytes are what they were, or None."""
    kept = folder()
    kept.mkdir(mode=0o700, parents=True, exist_ok=True)  # it may have been taken away
    require_own(kept)
    for file in kept.glob(f"host-{key}-*.so"):
        is_file = stat.S_ISREG(file.lstat().st_mode)  # and no pipe, which would not end
        if is_file and digest(file.read_bytes()) == file.stem.rpartition("-")[2]:
            return file
        file.unlink(missing_ok=True)
    return None


def built(key, source, command):
    """The file of a library, compiled now. It appears whole or not at all."""
    kept = folder()
    clear(kept)
    with tempfile.TemporaryDirectory(dir=kept, prefix=PART) as part:
        made = Path(part) / "library.so"
        finished([*command, "-x", "c++", "-", "-o", str(made)], source)
        flush(made)
        file = kept / f"host-{key}-{digest(made.read_bytes())}.so"
        os.replace(made, file)
    flush(kept)
    return file
