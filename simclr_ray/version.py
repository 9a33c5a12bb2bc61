"""The version, apart from the package's front so that every room may name it."""

__version__ = "0.1.0"

PINNED = "SIMCLR_RAY_PINNED"
"""Environment variable of a job: the versions of the packages where it was submitted, as JSON; see `train.cluster`."""
