"""Several command lines in one process, for starting Python and its libraries takes longer than most of them.

    python -m tests.servers.calls '[["jobs", "ls"], ["jobs", "status", "x"]]'

Prints a JSON list: exit code, standard output and standard error of each.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys

from simclr_ray.cli import main


def call(arguments: list[str]) -> tuple[int, str, str]:
    """One command line: its exit code and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    return code, out.getvalue(), err.getvalue()


if __name__ == "__main__":
    print(json.dumps([call(arguments) for arguments in json.loads(sys.argv[1])]))
