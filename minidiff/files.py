"""The files that a run leaves are whole or not there.

A run may be killed at any moment, a disk may be full. `whole` writes any file, `only_run`
keeps a folder for one run. `weights` writes what a network learnt.
"""

import json
import os
import shutil
import tempfile
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from numpy.lib import format as npy

PART = ".part-"  # begins the name of what is not whole yet
OF_A_RUN = ".safetensors", ".previous", ".png"  # what `only_run` keeps for one run


def flush(path):
    """Write a file's bytes, or a folder's names, to the disk: they outlive a loss of power.

    Windows opens no folders, so there the names are left to the system.
    """
    if os.name != "posix" and path.is_dir():
        return
    fd = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def untouched(file):
    """An OSError inside is one line, which says that what was there before is there still.
    """
    try:
        yield
    except OSError as e:
        raise OSError(f"{file}: not written, what was there before is untouched "
                      f"({e.strerror or e})") from e


@contextmanager
def whole(file):
    """A path to write to: what lies there at the end becomes `file` at once, or nothing.

    The path ends like file's name. Where `file` is a link, what it leads to is replaced.
    Who may read the old file may read the new one.
    OSError, in one line, where it cannot be written: what was there before is there still.

    >>> with whole("rows.json") as part:  # doctest: +SKIP
    ...     part.write_text("[]")
    """
    target = Path(os.path.realpath(file))
    part = target.with_name(f"{PART}{os.getpid()}{Path(file).suffix}")
    try:
        with untouched(file):
            yield part
            if target.exists():
                shutil.copymode(target, part)
            flush(part)
            os.replace(part, target)
            flush(target.parent)
    finally:
        part.unlink(missing_ok=True)


def write_json(file, rows):
    """Write what JSON can hold, whole or not at all."""
    with whole(file) as part:
        part.write_text(json.dumps(rows, indent=1) + "\n")


def write_samples(file, n, parts, also=None):
    """Write n samples as the array x of a .npz file, from successive parts of them.

    also: {name: parts} of other arrays, (n,), that go into the file.
    It is whole or not written at all, and memory is that of a part. The parts first go into
    a file without a name: of a process that is killed while they come nothing is left.
    ValueError where the disk has no room for both, once the first part tells the size.
    """
    target = Path(os.path.realpath(file))
    with tempfile.TemporaryFile(dir=target.parent) as raw:
        for x in parts:
            if raw.tell() == 0:
                header = _header(n, x)
                _require_room(file, 2 * n * x[0].nbytes)
            with untouched(file):
                raw.write(np.ascontiguousarray(x))
        with whole(file) as part:
            raw.seek(0)
            with (zipfile.ZipFile(part, "w") as archive,
                  archive.open("x.npy", "w", force_zip64=True) as f):
                npy.write_array_header_1_0(f, header)
                shutil.copyfileobj(raw, f)
            with zipfile.ZipFile(part, "a") as archive:
                for name, arrays in (also or {}).items():
                    _write_parts(archive, name, n, arrays)


def _header(n, rows):
    """The header of an array of n such rows, as NumPy's format has it."""
    return {"descr": npy.dtype_to_descr(rows.dtype), "fortran_order": False,
            "shape": (n, *rows.shape[1:])}


def _write_parts(archive, name, n, arrays):
    """Write an array of n rows from successive parts of it."""
    with archive.open(f"{name}.npy", "w", force_zip64=True) as f:
        for k, part in enumerate(arrays):
            if k == 0:
                npy.write_array_header_1_0(f, _header(n, part))
            f.write(part.tobytes())


def _require_room(file, needed):
    """ValueError unless so many bytes fit where a file will be."""
    free = shutil.disk_usage(Path(file).resolve().parent).free
    if needed > free:
        raise ValueError(f"{file}: {needed >> 20} MiB are needed there, {free >> 20} are "
                         "free")


def require_file(file):
    """ValueError, in one line, for what is not there and for what is no file.

    A device or a pipe would be read without end.
    """
    path = Path(file)
    if path.is_file():
        return
    if path.is_dir():
        raise ValueError(f"{file}: is a directory")
    raise ValueError(f"{file}: {'not a file' if path.exists() else 'no such file'}")


def second_name(file, spare):
    """Give a file another name: a link, or a copy where the file system has no links."""
    try:
        os.link(file, spare)
    except OSError:
        shutil.copyfile(file, spare)
        flush(spare)


def make_folder(out):
    """The folder --out, made where it is missing.

    ValueError where nothing can be written there.
    """
    try:
        os.makedirs(out, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as e:
        raise ValueError(f"--out {out}: no files can be written there "
                         f"({e.strerror})") from None
    return Path(out)


def check_file(option, file):
    """ValueError where no file can be written, or would replace one of another kind."""
    path = Path(file)
    if option == "--json" and path.suffix != ".json":
        raise ValueError(f"{option} {file}: results are written as .json")
    try:
        if path.is_dir():
            raise IsADirectoryError
        tempfile.TemporaryFile(dir=os.path.realpath(path.parent)).close()
    except OSError:
        raise ValueError(f"{option} {file}: not a file in a folder that can be "
                         "written") from None


@contextmanager
def only_run(out):
    """The folder --out for this run alone, until it ends, by whatever end.

    What a killed run had not finished writing is cleared away.
    ValueError where nothing can be written there, or another run is at work.
    """
    folder = make_folder(out)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"--out {out}: another run is writing there; choose another "
                         "folder") from None
    except OSError as e:
        raise ValueError(f"--out {out}: it cannot be locked ({e.strerror})") from None
    try:
        for part in folder.glob(f"{PART}*"):
            if part.suffix in OF_A_RUN:
                part.unlink(missing_ok=True)
        yield folder
    finally:
        lock.release()
