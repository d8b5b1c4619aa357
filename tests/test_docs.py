"""The documentation is true: its examples run, its links lead somewhere, its picture is that of its table."""

import csv
import doctest
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "profiles" / "README.md"])
CODE = {"lance_edge": ROOT, "lance_host": ROOT / "host", "lance_device": ROOT / "device"}
OPTIONS = doctest.NORMALIZE_WHITESPACE


def name_of(path):
    return str(path.relative_to(ROOT))


def with_examples(paths):
    return [path for path in paths if ">>> " in path.read_text(encoding="utf-8")]


def modules_with_examples():
    for package, root in CODE.items():
        for path in with_examples(sorted((root / package).rglob("*.py"))):
            yield ".".join(path.relative_to(root).with_suffix("").parts)


@pytest.mark.parametrize("page", with_examples(PAGES), ids=name_of)
def test_the_examples_of_a_page(page):
    result = doctest.testfile(str(page), module_relative=False, optionflags=OPTIONS)
    assert result.failed == 0
    assert result.attempted > 0


def test_there_are_examples():
    assert len(with_examples(PAGES)) >= 3


def test_the_examples_of_docstrings():
    results = {
        name: doctest.testmod(importlib.import_module(name), optionflags=OPTIONS)
        for name in modules_with_examples()
    }
    assert [name for name, result in results.items() if result.failed] == []
    assert sum(result.attempted for result in results.values()) >= 12


def anchors(page):
    """The ids that a heading gets on GitHub and from MyST, and those that are written out as `(name)=`."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    found = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return found | set(re.findall(r"^\(([\w-]+)\)=$", text, flags=re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        other = (page.parent / file).resolve() if file else page
        assert other.exists(), target
        if anchor:
            assert anchor in anchors(other), target


def test_every_page_is_in_a_table_of_contents():
    """Sphinx says so too; this needs no Sphinx."""
    listed = re.findall(r"```\{toctree\}\n(?::.*\n)*([^`]*)```", (ROOT / "docs" / "index.md").read_text())
    names = {line for block in listed for line in block.split()}
    docs = ROOT / "docs"
    assert names == {str(page.relative_to(docs).with_suffix("")) for page in docs.rglob("*.md")} - {"index"}


def test_the_picture_of_the_readme_is_that_of_its_table():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    with (ROOT / "docs" / "figures" / "cifar10.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    (table,) = (line for line in readme.splitlines() if line.startswith("| CIFAR-10"))
    (caption,) = (line for line in readme.splitlines() if line.startswith("![CIFAR-10"))
    for row in rows:
        accuracy = f"{float(row['test_accuracy_percent']):.1f} %"
        assert accuracy in table
        assert f"{row['method']} {accuracy}" in caption
    assert "111.6 KiB" in readme
    assert float(rows[1]["activation_kib"]) == pytest.approx(111.6, abs=0.05)
    assert float(rows[2]["activation_kib"]) / 1024 == pytest.approx(17.58, abs=0.005)


def tables_of_rows():
    text = (ROOT / "docs" / "reference" / "csv.md").read_text(encoding="utf-8")
    names = re.findall(r"^```\{rows\} (.+)$", text, flags=re.MULTILINE)
    return [
        name for name in names if not name.startswith("lance_host.reproduce")
    ]  # its columns are the claims'


@pytest.mark.parametrize("name", tables_of_rows())
def test_every_column_of_the_reference_has_a_meaning(name, monkeypatch):
    pytest.importorskip(
        "docutils", reason="the documentation is built with Sphinx: pip install 'lance-edge[docs]'"
    )
    monkeypatch.syspath_prepend(ROOT / "docs" / "_ext")
    columns_of = importlib.import_module("row_tables").columns_of
    module, _, kind = name.rpartition(".")
    rows = columns_of(getattr(importlib.import_module(module), kind))
    assert rows
    assert [column for column, _, meaning in rows if not meaning] == []


def test_the_reference_of_commands_is_made_from_the_commands():
    text = (ROOT / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    assert "```{commands} lance_host.cli:cli" in text
    assert "```{commands} lance_device.cli:main" in text
