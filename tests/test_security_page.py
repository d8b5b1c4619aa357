"""SECURITY.md names a test for every promise: the tests must be there."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "SECURITY.md").read_text()
PROMISES = re.findall(r"^\| \d+ \| \*\*(.+?)\*\*.*?\| (.+) \|$", PAGE, re.MULTILINE)


def test_every_promise_names_tests_that_exist():
    assert len(PROMISES) == 10
    for promise, cell in PROMISES:
        named = re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", cell)
        assert named, promise
        for file, function in named:
            tree = ast.parse((TESTS / file).read_text())
            defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert any(name.startswith("test_") for name in defined), file
            assert not function or function in defined, f"{promise} {file}::{function}"
