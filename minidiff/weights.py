"""Tensors in a file: what a network learnt, or the state of its training.

What is read is compared with a checksum first: a file may have been cut short, a bit of it
may have changed, or it may be of another program.
"""

import hashlib
import json
import math
import os
from pathlib import Path

import safetensors.torch
import torch

from . import __version__
from .files import PART, flush, require_file, second_name, whole
from .net import ScoreNet, usual_defaults
from .npz import MOST_LEVELS, WIDEST, free_memory


def save(file, tensors, metadata):
    """Write safetensors whole or not at all; the file it replaces stays as *.previous.

    At every moment two saves are whole, once there were two.
    metadata: a dict of what JSON can hold. With it go this version and a checksum.
    OSError where the file cannot be written, FloatingPointError where a number is NaN or
    infinite; either way the old file stays.
    """
    if wrong := not_finite(tensors):
        raise FloatingPointError(f"{file}: not saved, {wrong}: lower --lr")
    file = Path(os.path.realpath(file))
    spare = file.with_name(f"{PART}{os.getpid()}.previous")
    tensors = {name: u.detach().cpu().contiguous() for name, u in tensors.items()}
    text = json.dumps({"version": __version__, **metadata})
    said = {"minidiff": text, "sha256": _checksum(tensors, text)}
    try:
        with whole(file) as part:
            part.write_bytes(safetensors.torch.save(tensors, said))
            if file.exists():
                second_name(file, spare)
        if spare.exists():
            os.replace(spare, file.with_suffix(".previous"))
            flush(file.parent)
    finally:
        spare.unlink(missing_ok=True)


def _checksum(tensors, text):
    """SHA-256 of tensors, their names, dtypes and shapes, and the text beside them."""
    found = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        u = tensors[name]
        found.update(f"\0{name}\0{u.dtype}{list(u.shape)}".encode())
        found.update(u.reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def not_finite(tensors):
    """What is wrong with the first tensor that holds NaN or infinity, or None."""
    for name, u in tensors.items():
        if u.is_floating_point() and not u.float().isfinite().all():
            return f"{name} holds NaN or infinity"
    return None


def read(file):
    """(tensors, metadata) of a file that `save` wrote.

    ValueError, in one line, for any other file and for one that a bit was changed in. Where
    the save before it is whole, the line says so.
    """
    try:
        return _read(file)
    except ValueError as e:
        start, end = os.path.splitext(file)
        previous = f"{start}.previous"
        if end == ".previous" or not os.path.exists(previous):
            raise
        try:
            _, before = _read(previous)
        except ValueError:
            raise e from None
        step = f", of iteration {before['step']}," if "step" in before else ""
        raise ValueError(f"{e}; the save before it{step} is whole: {previous}") from None


def _read(file):
    """`read`, of this file alone."""
    require_file(file)
    size = os.path.getsize(file)
    if size > free_memory():
        raise MemoryError(f"{file} holds {size} bytes")
    try:
        data = Path(file).read_bytes()
    except OSError as e:
        raise ValueError(f"{file}: {e.strerror.lower()}") from None
    try:
        tensors = safetensors.torch.load(data)
        length = int.from_bytes(data[:8], "little")
        said = json.loads(data[8:8 + length]).get("__metadata__") or {}
        text = said.get("minidiff", "null")
        metadata = json.loads(text)
    except MemoryError:
        raise
    except Exception as e:  # of bytes that anybody wrote
        raise ValueError(f"{file}: not a readable safetensors file ({e})") from None
    if not isinstance(metadata, dict):
        raise ValueError(f"{file}: a safetensors file, but not minidiff's")
    # versions before 0.4.0 wrote neither
    of_today = "sha256" in said or "version" in metadata
    if of_today and said.get("sha256") != _checksum(tensors, text):
        raise ValueError(f"{file}: damaged, it is not as it was written (checksum)")
    if wrong := not_finite(tensors):
        raise ValueError(f"{file}: {wrong}")
    return tensors, metadata


def kinds(tensors):
    """{name: (dtype, shape)}."""
    return {name: (u.dtype, u.shape) for name, u in tensors.items()}


def _is_whole(n, least, most):
    """Whether this is an int between these, and no bool."""
    return type(n) is int and least <= n <= most


def _is_shape(shape):
    """Whether this is (D,) or (channels, H, W), as a list of whole numbers above 0."""
    return (isinstance(shape, list) and len(shape) in (1, 3)
            and all(_is_whole(n, 1, WIDEST) for n in shape))


def _is_ends(ends):
    """Whether these are two finite floats, the first smaller; or None, as 0.2.0 wrote."""
    if ends is None:
        return True
    if not isinstance(ends, list) or [type(v) for v in ends] != [float, float]:
        return False
    return 0 < ends[1] - ends[0] < math.inf


def _are_classes(classes):
    """Whether these are numbers of samples by their class's name; or None."""
    if classes is None:
        return True
    return (isinstance(classes, dict) and 2 <= len(classes) <= WIDEST
            and all(_is_whole(n, 0, 1 << 62) for n in classes.values())
            and any(classes.values()))


def _is_of_a_model(metadata):
    """Whether metadata has what describes a model, each of its kind."""
    words = ["data"]
    if "digest" in metadata:  # since 0.4.0
        words += "digest", "split"
    levels = metadata.get("levels", 0)
    return (all(isinstance(metadata.get(key), str) for key in words)
            and _is_shape(metadata.get("shape"))
            and (levels is None or _is_whole(levels, 2, MOST_LEVELS))
            and _is_ends(metadata.get("ends"))
            and _are_classes(metadata.get("classes"))
            and type(metadata.get("seed")) is int)


def load_model(file, device="cpu"):
    """(score network ready to sample, metadata) from a model file.

    No memory is taken for a network that the file's tensors do not fit.
    ValueError, in one line, for any other file.
    """
    tensors, metadata = read(file)
    # as before 0.2.0 and before 0.7.0
    metadata = {"ends": None, "seed": 0, "classes": None, **metadata}
    if "step" in metadata:
        raise ValueError(f"{file} is the state of a training; its model lies beside it, in "
                         "model.safetensors")
    if not _is_of_a_model(metadata):
        raise ValueError(f"{file}: a safetensors file, but not minidiff's")
    with usual_defaults(), torch.device("meta"):  # without memory
        classes = metadata["classes"] or {}
        net = ScoreNet(tuple(metadata["shape"]), classes=len(classes))
    if kinds(tensors) != kinds(net.state_dict()):
        writer = f"minidiff {metadata.get('version', '0.3')!s:.20}"
        raise ValueError(f"{file}: weights of another architecture or dtype, by {writer}; "
                         f"this is {__version__}: train it again")
    net.load_state_dict(tensors, assign=True)
    net = net.to(device, memory_format=torch.channels_last)
    return net.eval().requires_grad_(False), metadata
