"""A user's .npz file: what it holds, before anything is read; which array is trained on.

A file may be damaged, may claim more than it holds, or more than memory takes. So headers
come first. `contents` lists the arrays, `choose` says which of them are used, and `read`
reads one. `grey_levels` finds out whether numbers are pixels.
"""

import re
import zipfile
from contextlib import contextmanager
from math import inf, prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.lib import format as npy

from .files import require_file

LABELS = {"y", "label", "labels", "target", "targets", "class", "classes"}
TRAIN = {"train", "training"}
TEST = {"test", "testing"}
VALIDATION = {"val", "valid", "validation", "dev"}
BY_HASH = "by hash"
MOST_LEVELS = 1 << 16  # beyond that whole numbers are as good as continuous
A_CLASS = 10  # samples on average at least, else labels are no classes
WIDEST = 1 << 20  # of one axis of a sample
# of a container, by the two versions of control groups: its limit, its use, statistics, and
# the name there of what the system keeps of files and gives up when asked
GROUPS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat",
     "total_inactive_file"),
)


class Member(NamedTuple):
    """An array in a file, by its header."""

    name: str
    shape: tuple
    dtype: np.dtype

    @property
    def nbytes(self):
        """The bytes of its numbers."""
        return prod(self.shape) * self.dtype.itemsize

    def __str__(self):
        return f"{self.name} {self.shape} {self.dtype}"


class Source(NamedTuple):
    """Samples in their own units, of which a data set is made, and how it is split.

    labels: the class of each sample of x, from 0 on, where it is known, test_labels those
    of the test array; classes: what the file calls them.
    """

    x: np.ndarray
    what: str
    split: str = BY_HASH
    test: np.ndarray | None = None
    labels: np.ndarray | None = None
    classes: tuple = ()
    test_labels: np.ndarray | None = None

    def arrays(self):
        """x, and the test array where there is one."""
        return [u for u in (self.x, self.test) if u is not None]


class Choice(NamedTuple):
    """The arrays of a file, by what they are for; `test` may be None.

    labels: all arrays of labels, whichever samples they belong to.
    """

    train: Member
    test: Member | None
    labels: list
    unused: list


def contents(file):
    """{name: Member} of every array in a file, from the headers alone.

    What is no array is passed over. ValueError, in one line, where it cannot be read.
    """
    if not str(file).endswith(".npz"):
        raise ValueError(f"{file}: not a .npz file")
    require_file(file)
    with _errors(file):
        with open(file, "rb") as f:
            if f.read(6) == npy.MAGIC_PREFIX:
                raise ValueError("it is a single array, a .npy file: numpy.savez(file, "
                                 "x=array) writes a .npz file")
        with zipfile.ZipFile(file) as archive:
            members = [_member(archive, info) for info in archive.infolist()
                       if _is_array(info.filename)]
    by_name = {member.name: member for member in members}
    for member in members:
        if member is not by_name[member.name]:
            raise ValueError(f"{file}: holds {member.name} twice")
    return by_name


@contextmanager
def _errors(file):
    """Whatever zipfile and NumPy raise over bytes that anybody wrote, as one ValueError."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as e:
        said = str(e).partition("\n")[0] or type(e).__name__
        raise ValueError(f"{file}: not a readable .npz file ({said})") from None


def _is_array(filename):
    """Whether a member of an archive is an array, and not what macOS puts beside it."""
    path = Path(filename)
    beside = "__MACOSX" in path.parts or path.name.startswith("._")
    return filename.endswith(".npy") and not beside


def _member(archive, info):
    """The Member that an entry of an archive is; ValueError where its header is wrong."""
    name = info.filename.removesuffix(".npy")
    if info.flag_bits & 1:
        raise ValueError(f"{name} is encrypted")
    with archive.open(info) as f:
        try:
            shape, dtype = _header(f, name)
        except ValueError as e:
            raise ValueError(f"{name}.npy is no array: {e}") from None
        start = f.tell()
    member = Member(name, shape, dtype)
    held = info.file_size - start
    if not dtype.hasobject and held != member.nbytes:
        raise ValueError(f"{name} claims {member.nbytes} bytes, {shape} {dtype}, and holds "
                         f"{held}")
    return member


def _header(f, name):
    """(shape, dtype) of a .npy stream, which stands at its first number afterwards.

    What holds no numbers, but Python objects or named fields, has dtype object.
    """
    version = npy.read_magic(f)
    if version == (3, 0):  # for the names of fields
        return (), np.dtype(object)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read(f, max_header_size=1 << 20)
    if min(shape, default=0) < 0:
        raise ValueError(f"{name} claims a shape of {shape}")
    return shape, np.dtype(object) if dtype.hasobject else dtype


def read(file, member):
    """One array of a file. ValueError where it is damaged or too large for memory.

    Beside it there must be room for what is made of it: float32 of the same shape.
    """
    needed = member.nbytes + 4 * prod(member.shape)
    free = free_memory()
    if needed > free:
        raise ValueError(f"{file}: {member} needs {needed >> 20} MiB of memory, "
                         f"{free >> 20} are free")
    with (_errors(file), zipfile.ZipFile(file) as archive,
          archive.open(f"{member.name}.npy") as f):
        return npy.read_array(f, allow_pickle=False)  # zipfile compares a checksum


def _field(file, name):
    """The whole number behind a name in a file of the system."""
    found = re.search(rf"^{name}\s+(\d+)", file.read_text(), re.MULTILINE)
    return int(found[1])


def _number(file):
    """The whole number in a small file of the system; infinity where there is none."""
    try:
        return int(Path(file).read_text())
    except (OSError, ValueError):
        return inf


def free_memory(root="/"):
    """Bytes of memory that are left to this process, as Linux tells; elsewhere infinity.

    root: where proc and sys are.
    """
    free = inf
    meminfo = Path(root, "proc/meminfo")
    if meminfo.exists():
        free = _field(meminfo, "MemAvailable:") * 1024
    group = Path(root, "sys/fs/cgroup")
    for limit, used, statistics, files in GROUPS:
        limit = _number(group / limit)
        if limit < inf:
            left = limit - _number(group / used) + _field(group / statistics, files)
            free = min(free, left)
    return free


# ---- which array is trained on ----

def _words(member):
    """The words of a name in lower case: x and train of x_train, trainX and Xtrain."""
    apart = re.sub("([a-z])([A-Z])", r"\1_\2", member.name).lower()
    apart = re.sub("([xy])(train|test|val)", r"\1_\2", apart)
    return set(re.findall("[a-z]+", apart))


def _is_label(member, members):
    """Whether an array names each sample's class: by its name, or by its shape."""
    lengths = {m.shape[0] for m in members if len(m.shape) > 1}
    by_shape = len(member.shape) == 1 and member.shape[0] in lengths
    return by_shape or bool(_words(member) & LABELS)


def choose(file, members):
    """The Choice among the members of a file, by their names and shapes.

    Trained on is what is called after training (x_train, train_images), or `x`, or the only
    array that there is, whatever its name. One called after a test is held out; of several
    the one called like the first, as x_test is beside x_train. Labels are found and apart.
    ValueError where several arrays could be meant.
    """
    members = list(members.values())
    labels = [m for m in members if _is_label(m, members)]
    numeric = [m for m in members if m.dtype.kind in "fiub" and len(m.shape) in (2, 3, 4)]
    possible = [m for m in numeric if m not in labels] or numeric
    others = [m for m in possible if not _words(m) & (TEST | VALIDATION)]
    called_train = [m for m in others if _words(m) & TRAIN]
    called_x = [m for m in others if _words(m) == {"x"}]
    train = _only(file, called_train or called_x or others or possible, members)
    tests = [m for m in possible if _words(m) & TEST and m != train]
    partner = re.sub("train", "test", train.name, flags=re.IGNORECASE)
    named = [m for m in tests if m.name.lower() == partner.lower()]
    test = _only(file, named or tests, members) if tests else None
    if test and (test.shape[1:], test.dtype) != (train.shape[1:], train.dtype):
        raise ValueError(f"{file}: {train} and {test} are not alike")
    labels = [m for m in labels if m != train]
    unused = [m for m in members if m not in (train, test, *labels)]
    return Choice(train, test, labels, unused)


def _only(file, found, members):
    """The one of the arrays found. ValueError, with all members, unless it is one."""
    if len(found) == 1:
        return found[0]
    held = ", ".join(map(str, members)) or "nothing"
    if not found:
        raise ValueError(f"{file}: no numeric array of 2 to 4 axes; it holds {held}")
    names = ", ".join(m.name for m in found)
    raise ValueError(f"{file}: which of {names} is meant? Call the samples x, or x_train "
                     f"and x_test; it holds {held}")


def source(file):
    """The Source that a file is: the arrays that `choose` chose. ValueError in one line."""
    choice = choose(file, contents(file))
    x = _samples(file, choice.train)
    what = f"{choice.train}, as {_layout(x)}"
    used = []
    labels = test_labels = None
    names = ()
    named = _labels_of(choice)
    found = named and classes(read(file, named))
    if found:
        labels, names = found
        used.append(named)
        what += f", {len(names)} classes in {named.name}"
        beside = _test_labels_of(choice, named)
        test_labels = beside and numbered(read(file, beside), names)
    if test_labels is not None:
        used.append(beside)
        what += f" and {beside.name}"
    unused = [f"{m.name} (labels)" for m in choice.labels if m not in used]
    unused += [m.name for m in choice.unused]
    if unused:
        what += f"; not used: {', '.join(unused)}"
    if choice.test is None:
        return Source(x, what, labels=labels, classes=names)
    split = f"in {choice.test.name}"
    return Source(x, what, split, _samples(file, choice.test), labels, names, test_labels)


def _labels_of(choice):
    """The array with a label for each sample trained on, by its name, or None.

    Where none is called after labels, one of two without names is meant. None unless it is
    one array.
    """
    fit = [m for m in _fitting(choice, choice.train)
           if not _words(m) & (TEST | VALIDATION)]
    named = [m for m in fit if _words(m) & LABELS]
    nameless = [m for m in fit if _words(m) == {"arr"}]  # numpy.savez's own word
    found = named or nameless
    return found[0] if len(found) == 1 else None


def _test_labels_of(choice, named):
    """The array beside the test array that is called as `named` is, or None."""
    if choice.test is None:
        return None
    found = [m for m in _fitting(choice, choice.test)
             if _words(m) & TEST and _words(m) - TEST == _words(named) - TRAIN]
    return found[0] if len(found) == 1 else None


def _fitting(choice, member):
    """The arrays of labels that may be those of a member's samples."""
    return [m for m in choice.labels if m.shape[:1] == member.shape[:1]
            and len(m.shape) < 3 and m.dtype.kind in "biufUS"]


def _values(labels):
    """Labels as whole numbers or words, (n,), or None where they are no such thing."""
    labels = labels.reshape(len(labels), -1)
    if labels.shape[1] == 1:
        labels = labels[:, 0]
    elif labels.dtype.kind in "biuf" and is_one_hot(labels):
        labels = labels.argmax(1)
    else:
        return None
    if labels.dtype.kind == "S":
        labels = np.char.decode(labels, "utf8", "backslashreplace")
    if labels.dtype.kind in "Uiu":
        return labels
    whole = (abs(labels) < 2**53) & (labels == np.round(labels))
    return labels.astype(np.int64) if whole.all() else None


def classes(labels):
    """(numbers, names): labels as whole numbers from 0 on, (n,), and what each was called,
    in order. None where they are no classes.

    labels: (n,) or (n, 1) whole numbers or words, or (n, K) with a 1 in each row's class.
    Classes are two at least, and have A_CLASS samples on average.
    """
    values = _values(labels)
    if values is None:
        return None
    names, found = np.unique(values, return_inverse=True)
    if not 2 <= len(names) <= len(found) // A_CLASS:
        return None
    return found, tuple(map(str, names.tolist()))


def numbered(labels, names):
    """Other labels as the places of their names, (n,); None where one is not among them."""
    values = _values(labels)
    places = {name: k for k, name in enumerate(names)}
    found = [places.get(str(v)) for v in ([] if values is None else values.tolist())]
    return None if None in found or not found else np.array(found)


def is_one_hot(rows):
    """Whether every row is 0 but for a single 1."""
    ones = (rows == 1).sum(1)
    zeros = (rows == 0).sum(1)
    return bool((ones == 1).all() and (zeros == rows.shape[1] - 1).all())


def _layout(x):
    """The sizes of a sample in words."""
    if x.ndim == 2:
        return f"points of {x.shape[1]} coordinates"
    _, channels, height, width = x.shape
    return f"images of {height} by {width}, {channels} channel{'s'[:channels > 1]}"


def _samples(file, member):
    """The samples in an array of a file: points (n, D) or images (n, C, H, W)."""
    if 0 in member.shape or len(member.shape) == 2 and member.shape[1] < 2:
        raise ValueError(f"{file}: {member}; points need two axes or more, images pixels")
    if max(member.shape[1:]) > WIDEST:
        raise ValueError(f"{file}: {member}; an axis of a sample is at most {WIDEST}")
    x = as_images(read(file, member))
    if x.dtype.kind == "f" and not all(np.isfinite(u).all() for u in chunks(x)):
        raise ValueError(f"{file}: {member.name} holds NaN or inf")
    return x


# ---- what its numbers are ----

def chunks(x, elements=1 << 20):
    """Successive rows of x, some 2^20 elements at a time: what is computed stays small."""
    rows = max(1, elements // max(1, prod(x.shape[1:])))
    for start in range(0, len(x), rows):
        yield x[start:start + rows]


def level_of(x, levels, low, high):
    """Which of `levels` even numbers from low to high x is, 0 for low, in float64."""
    return (x.astype(np.float64) - low) / (high - low) * (levels - 1)


def is_graded(arrays, levels, low, high):
    """Whether all numbers of arrays are among `levels` even ones from low to high.

    Missing one by the rounding of an array's dtype is allowed, or by float32's.
    """
    return all(_is_graded(x, levels, low, high) for x in arrays)


def _is_graded(x, levels, low, high):
    """`is_graded` of one array."""
    rounding = np.finfo(x.dtype).eps if x.dtype.kind == "f" else 0.
    slack = np.clip(levels * rounding, 1e-4, .1)
    for rows in chunks(x):
        k = level_of(rows, levels, low, high)
        near = np.abs(k - np.round(k)) <= slack
        inside = (k >= -slack) & (k <= levels - 1 + slack)
        if not (near & inside).all():
            return False
    return True


def grey_levels(arrays, low, high):
    """(levels, (first, last)) of arrays from low to high; levels is None for no pixels.

    Pixels have the same levels whatever their dtype. Whole numbers from 0 to below 128 have
    as many as there are; larger ones the next power of two, 256 for bytes. In [0, 1] and
    [-1, 1] bytes that were divided are known again.
    """
    candidates = [(256, 0., 1.), (256, -1., 1.)]
    first = min(low, 0.)
    whole = high - first + 1
    if whole <= MOST_LEVELS and whole == int(whole):
        levels = int(whole)
        if first == 0 and levels > 128:
            levels = 1 << (levels - 1).bit_length()
        candidates = [(levels, first, first + levels - 1), *candidates]
    for levels, first, last in candidates:
        if first <= low and high <= last and is_graded(arrays, levels, first, last):
            return levels, (first, last)
    return None, (low, high)


def as_images(x):
    """x as (n, D) or (n, C, H, W): a channel is added, channels that come last go first.

    They come last where the last axis has at most four and the second has more.
    """
    if x.ndim == 3:
        return x[:, None]
    if x.ndim == 4 and x.shape[3] <= 4 < x.shape[1]:
        return x.transpose(0, 3, 1, 2)
    return x


def scale(name, source):
    """(levels, ends) of a source's own numbers."""
    arrays = source.arrays()
    low = min(float(u.min()) for u in arrays)
    high = max(float(u.max()) for u in arrays)
    if low == high:
        raise ValueError(f"{name}: every value is {low:g}")
    if not high - low < np.inf:
        raise ValueError(f"{name}: values from {low} to {high} are too far apart")
    return grey_levels(arrays, low, high)


def require_levels(name, source, levels, ends):
    """ValueError unless the samples are among a model's grey levels, where it has such."""
    if levels and not is_graded(source.arrays(), levels, *ends):
        raise ValueError(f"{name}: some numbers are none of the {levels} grey levels from "
                         f"{ends[0]:g} to {ends[1]:g}")
