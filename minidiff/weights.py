"""Tensors in a file: what a network learnt, or the state of its training.

What is read is compared with a checksum first: a file may have been cut short, a bit of it
may have changed, or it may be of another program.
"""

import hashlib
import json
import os
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError

from . import __version__
from .files import PART, flush, second_name, whole


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
        previous = Path(file).with_suffix(".previous")
        if previous == Path(file):
            raise
        try:
            _, before = _read(previous)
        except ValueError:
            raise e from None
        step = f", of iteration {before['step']}," if "step" in before else ""
        raise ValueError(f"{e}; the save before it{step} is whole: {previous}") from None


def _read(file):
    """`read`, of this file alone."""
    if not Path(file).is_file():
        raise ValueError(f"{file}: no such file")
    try:
        data = Path(file).read_bytes()
        tensors = safetensors.torch.load(data)
        length = int.from_bytes(data[:8], "little")
        said = json.loads(data[8:8 + length]).get("__metadata__") or {}
        text = said.get("minidiff", "null")
        metadata = json.loads(text)
    except (SafetensorError, OSError, ValueError, RecursionError) as e:
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
