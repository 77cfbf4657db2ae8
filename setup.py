"""pip install --use-pep517 -e .   (see README.md)"""

import os
import sys

from setuptools import setup

if "develop" in sys.argv and "bdist_wheel" not in sys.argv:
    sys.exit("this layout needs a PEP 517 install: pip install --use-pep517 -e .")

LINK = os.path.join(".build", "src", "minidiff")
ROOMS = {"packages": ["minidiff", "minidiff.kernels", "minidiff.bench"],
         "package_dir": {"minidiff.kernels": "kernels", "minidiff.bench": "bench"},
         "package_data": {"minidiff.kernels": ["*.cu"]}}


def linked():
    """The package for an editable install: a link to its folder, alone on a path of its own.

    Of what is on Python's path, the clone's own name, seen from its parent folder, would hide
    what an import hook finds. What lies on the path it does not hide.
    """
    os.makedirs(os.path.dirname(LINK), exist_ok=True)
    if not os.path.islink(LINK):
        os.symlink(os.path.join("..", "..", "minidiff"), LINK, target_is_directory=True)
    return {"packages": ["minidiff"], "package_dir": {"": os.path.dirname(LINK)}}


def rooms():
    """Where the packages are; by setuptools' import hook where no link can be made (Windows)."""
    try:
        return linked() if "editable_wheel" in sys.argv else ROOMS
    except OSError:
        return ROOMS


os.makedirs(".build", exist_ok=True)
setup(
    name="minidiff",
    version="0.2.0",
    description="Score-based generative modelling from scratch, with kernels that return "
                "NumPy's bits",
    python_requires=">=3.11",
    **rooms(),
    install_requires=["numpy>=2.0,<2.6", "torch>=2.11,<2.14", "scikit-learn>=1.5,<1.10",
                      "matplotlib>=3.9,<4", "safetensors>=0.4,<0.9", "tqdm>=4.66,<5",
                      "scipy>=1.13,<2"],
    extras_require={
        "test": ["pytest>=8,<10", "pytest-benchmark[histogram]>=5,<6", "hypothesis>=6.100,<7",
                 "ruff>=0.6,<1", "triton>=3.6,<3.10; platform_system == 'Linux'"],
        "cuda12": ["cupy-cuda12x>=14,<15"],
        "cuda13": ["cupy-cuda13x>=14,<15", "nvidia-cuda-nvrtc>=13,<14"],
    },
    entry_points={"console_scripts": ["minidiff = minidiff.__main__:main"]},
    options={"egg_info": {"egg_base": ".build"}, "build": {"build_base": ".build/build"},
             "bdist_wheel": {"dist_dir": ".build/dist"}},
)
