"""pip install --use-pep517 -e .   (see README.md)"""

import os
import sys

from setuptools import setup

if "develop" in sys.argv and "bdist_wheel" not in sys.argv:
    sys.exit("this layout needs a PEP 517 install: pip install --use-pep517 -e .")

# An editable install puts .src on Python's path, with a link to minidiff/ in it.
# An import hook would come after the path. There, seen from the clone's parent folder, the
# clone's own name is a package too, an empty one. A system without links has only the hook.
EDITABLE = "editable_wheel" in sys.argv
if EDITABLE and os.path.islink(os.path.join(".src", "minidiff")):
    ROOMS = {"packages": ["minidiff"], "package_dir": {"": ".src"}}
else:
    ROOMS = {
        "packages": ["minidiff", "minidiff.kernels", "minidiff.kernels.check",
                     "minidiff.kernels.check.yours", "minidiff.bench",
                     "minidiff.bench.peers", "minidiff.bench.speed",
                     "minidiff.bench.device", "minidiff.bench.report"],
        "package_dir": {"minidiff.kernels": "kernels", "minidiff.bench": "bench"},
        "package_data": {"minidiff.kernels": ["*.cu"]},
    }

os.makedirs(".build", exist_ok=True)
setup(
    name="minidiff",
    version="0.8.0",
    description="Score-based generative modelling from scratch, with kernels that return "
                "NumPy's bits",
    python_requires=">=3.11",
    **ROOMS,
    install_requires=["numpy>=2.0,<2.6", "torch>=2.11,<2.15", "scikit-learn>=1.5,<1.10",
                      "matplotlib>=3.9,<4", "safetensors>=0.4,<0.9", "tqdm>=4.66,<5",
                      "scipy>=1.13,<2", "filelock>=3.12,<5"],
    extras_require={
        "test": ["pytest>=8,<10", "pytest-benchmark[histogram]>=5,<6",
                 "hypothesis>=6.100,<7", "ruff>=0.6,<1",
                 "triton>=3.6,<3.10; platform_system == 'Linux'"],
        "peers": ["diffusers>=0.35,<1", "jax>=0.5,<1",
                  "mkl>=2024; platform_machine == 'x86_64'"],
        "cuda12": ["cupy-cuda12x>=14,<15"],
        "cuda13": ["cupy-cuda13x>=14,<15", "nvidia-cuda-nvrtc>=13,<14"],
    },
    entry_points={"console_scripts": ["minidiff = minidiff.__main__:command"]},
    options={"egg_info": {"egg_base": ".build"}, "build": {"build_base": ".build/build"},
             "bdist_wheel": {"dist_dir": ".build/dist"}},
)
