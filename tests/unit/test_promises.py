"""The page of promises names tests that exist, and every promise and fault has one."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[2]
RESULTS = ("soak", "recovery")
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


def test_what_was_measured_is_as_recorded() -> None:
    soak, recovery = (json.loads((ROOT / f"benchmarks/results/{name}.json").read_text()) for name in RESULTS)
    text = " ".join(PAGE.split())
    growth, ours, bare = (
        soak["long_life"]["growth"],
        recovery["worker"]["ours"],
        recovery["worker"]["ray_train_alone_s"],
    )
    node, saved = recovery["node"], recovery["checkpoint_resnet50"]
    for words in (
        f"{soak['runs']} runs, {soak['commands']} commands, {soak['attempts']} attempts under random faults",
        f"{soak['equal_in_every_digit']} losses equal in every digit",
        f"killed {soak['long_life']['kills']} times in {soak['long_life']['minutes']:.0f} minutes",
        f"{growth['memory_mb']:+.0f} MB, open files {growth['files']:+.0f}, processes {growth['processes']:+.0f}",
        f"to the next step {median(one['next_step_s'] for one in ours):.1f} s",
        f"back after {median(bare):.1f} s",
        f"{median(node['ours_s']):.1f} s ({median(node['ray_train_alone_s']):.1f} s)",
        f"checkpoint of {saved['MB']:.0f} MB the steps stand still for {1000 * saved['stall_s']:.0f} ms",
        f"written in {saved['write_s']:.1f} s",
    ):
        assert words in text, words
