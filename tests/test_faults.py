"""docs/faults.md names tests that exist."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
DOCUMENT = TESTS.parent / "docs/faults.md"
ROW = re.compile(r"^\| (\d+) \| (.+?) \| (.+?) \|$", re.MULTILINE)
ROWS = ROW.findall(DOCUMENT.read_text(encoding="utf-8"))


def test_every_fault_has_its_line():
    assert [int(number) for number, _, _ in ROWS] == list(range(1, 18))


@pytest.mark.parametrize(("number", "tests"), [(number, tests) for number, _, tests in ROWS])
def test_the_tests_of_a_fault_exist(number, tests):
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", tests)
    assert len(named) == tests.count("`") // 2 > 0
    for file, name in named:
        [path] = TESTS.rglob(file)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"
