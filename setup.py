"""What pyproject.toml cannot say: a C kernel that is built where there is a compiler, and left out where not."""

from setuptools import Extension, setup

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

setup(
    ext_modules=[
        Extension("simclr_ray.views._native", ["simclr_ray/views/native.c"], extra_compile_args=FLAGS, optional=True)
    ]
)
