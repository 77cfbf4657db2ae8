"""Where minidiff.kernels and minidiff.bench are.

Installed, they are inside this folder. In a clone they are beside it, and this module tells
Python to look there.
"""

import os
import sys
from importlib.util import spec_from_file_location

ROOMS = "kernels", "bench"
HERE = os.path.dirname(os.path.realpath(__file__))


class Finder:
    """Python asks this for a module that it finds nowhere else."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        """The room of that name, or None."""
        package, _, room = name.partition(".")
        if package != __package__ or room not in ROOMS:
            return None
        folder = os.path.join(os.path.dirname(HERE), room)
        return spec_from_file_location(name, os.path.join(folder, "__init__.py"),
                                       submodule_search_locations=[folder])


if not os.path.isdir(os.path.join(HERE, ROOMS[0])):
    sys.meta_path.append(Finder)
