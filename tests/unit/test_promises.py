"""The page of promises names tests that exist, and every promise and fault has one."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "promises.md").read_text()
WITHOUT: set[int] = set()
"""Faults that the page says are not tried."""


def table() -> dict[int, list[str]]:
    """Test ids by number of the fault."""
    rows = re.findall(r"^\| (\d+) \| .* \| (.*) \|$", PAGE, flags=re.MULTILINE)
    return {int(number): re.findall(r"`([^`]+)`", tests) for number, tests in rows}


def test_every_fault_names_tests_that_exist() -> None:
    for number, tests in table().items():
        assert tests, f"fault {number} has no test"
        for one in tests:
            file, _, name = one.partition("::")
            tree = ast.parse((ROOT / file).read_text())
            assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, one


def test_no_fault_is_missing() -> None:
    assert sorted(set(table()) | WITHOUT) == list(range(1, 53))
    assert not set(table()) & WITHOUT
    for number in WITHOUT:
        assert re.search(rf"Without a test yet:.*\b{number}\b", PAGE, flags=re.DOTALL)


def test_every_promise_names_faults_of_the_table() -> None:
    promises = re.findall(r"^\| \*\*[^|]+ \| ([\d, ]+) \|$", PAGE, flags=re.MULTILINE)
    assert len(promises) == 9
    for faults in promises:
        assert {int(number) for number in faults.split(",")} <= set(table())
