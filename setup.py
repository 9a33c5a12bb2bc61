"""What pyproject.toml cannot say: a C kernel that is built where there is a compiler, and left out where not."""

import hashlib
from pathlib import Path

from setuptools import Extension, setup

SOURCE = "simclr_ray/views/native.c"
FLAGS = [
    "-std=c11",
    "-O3",
    # The same bytes on every machine: no multiply and add fused into one rounding where the processor can.
    "-ffp-contract=off",
    # No result depends on these, but without them minima, maxima and choices are not vectorised, and with Python's own
    # -fwrapv some loops are not.
    "-fno-wrapv",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-ffinite-math-only",
]

# The package compares this with its own copy of the source, so that a kernel that was left over is not used.
DIGEST = hashlib.sha256((Path(__file__).parent / SOURCE).read_bytes()).hexdigest()[:16]

setup(
    ext_modules=[
        Extension(
            "simclr_ray.views._native",
            [SOURCE],
            define_macros=[("SIMCLR_RAY_DIGEST", f"0x{DIGEST}ULL")],
            extra_compile_args=FLAGS,
            depends=["setup.py"],
            optional=True,
        )
    ]
)
