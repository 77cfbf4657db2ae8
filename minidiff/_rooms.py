"""Where minidiff.kernels and minidiff.bench are.

Installed, they are inside this folder. In a clone they are beside it, and this module tells
Python to look there.
"""

import sys
from importlib.util import spec_from_file_location
from pathlib import Path

ROOMS = "kernels", "bench"
HERE = Path(__file__).resolve().parent


class Finder:
    """Python asks this for a module that it finds nowhere else."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        """The room of that name, or None."""
        package, _, room = name.partition(".")
        if package != __package__ or room not in ROOMS:
            return None
        folder = HERE.parent / room
        return spec_from_file_location(name, folder / "__init__.py",
                                       submodule_search_locations=[str(folder)])


if not (HERE / ROOMS[0]).is_dir():
    sys.meta_path.append(Finder)
