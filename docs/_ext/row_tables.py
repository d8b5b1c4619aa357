"""`{rows} package.module.Class`: the columns of a CSV file, from the dataclass that reads and writes it."""

import dataclasses
import importlib
import inspect
import re
import types
import typing

from docutils import nodes
from docutils.parsers.rst import Directive

WORDS = {int: "whole number", float: "number", str: "text", bool: "0 or 1"}


class Rows(Directive):
    required_arguments = 1

    def run(self):
        module, _, name = self.arguments[0].rpartition(".")
        kind = getattr(importlib.import_module(module), name)
        return [table([("column", "holds", "meaning"), *columns_of(kind)])]


def columns_of(kind):
    """`(column, what it holds, meaning)` of every field; meanings of inherited ones stand in the base class."""
    described = {}
    for one in reversed(kind.__mro__):
        described |= descriptions(inspect.cleandoc(one.__doc__ or "")) if dataclasses.is_dataclass(one) else {}
    hints = typing.get_type_hints(kind)
    return [(one.name, holds(hints[one.name]), described.get(one.name, "")) for one in dataclasses.fields(kind)]


def descriptions(doc):
    """`Attributes:` of a docstring: name -> text; `a, b: text` describes both."""
    _, _, section = doc.partition("Attributes:\n")
    found, names = {}, []
    for line in section.splitlines():
        match = re.match(r"    ([a-z_0-9]+(?:, [a-z_0-9]+)*): (.*)", line)
        if match:
            names = match[1].split(", ")
            found.update(dict.fromkeys(names, match[2]))
        elif line.startswith("        "):
            for name in names:
                found[name] += " " + line.strip()
    return found


def holds(hint):
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    text = WORDS.get(kinds[0], str(kinds[0]))
    return f"{text}, or empty" if types.NoneType in kinds else text


def table(rows):
    group = nodes.tgroup(cols=len(rows[0]))
    for _ in rows[0]:
        group += nodes.colspec(colwidth=1)
    for place, some in ((nodes.thead(), rows[:1]), (nodes.tbody(), rows[1:])):
        for cells in some:
            row = nodes.row()
            for index, text in enumerate(cells):
                is_name = index == 0 and place.tagname == "tbody"
                row += nodes.entry("", nodes.paragraph("", "", *inline(f"`{text}`" if is_name else text)))
            place += row
        group += place
    return nodes.table("", group)


def inline(text):
    """Text with `code` in backticks."""
    for index, piece in enumerate(text.split("`")):
        if piece:
            yield nodes.literal(piece, piece) if index % 2 else nodes.Text(piece)


def setup(app):
    app.add_directive("rows", Rows)
    return {"parallel_read_safe": True}
