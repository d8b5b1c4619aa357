"""`{commands} package.module:group`: every command with its help, usage and options, as click itself has them.

Help texts are plain text with `code` in backticks, not reStructuredText; what stands after click's `\\b` is
kept line by line.
"""

import importlib
import inspect

import click
from docutils import nodes
from docutils.parsers.rst import Directive
from row_tables import inline


class Commands(Directive):
    required_arguments = 2  # module:group, name of the program

    def run(self):
        module, _, name = self.arguments[0].partition(":")
        group = getattr(importlib.import_module(module), name)
        return [section(group, click.Context(group, info_name=self.arguments[1]))]


def section(command, context):
    path = context.command_path
    part = nodes.section(ids=[nodes.make_id(path)], names=[path])
    part += nodes.title("", path)
    part += paragraphs(inspect.cleandoc(command.help or ""))
    part += literal(command.get_usage(context).removeprefix("Usage: "))
    options = [record for option in command.get_params(context) if (record := option.get_help_record(context))]
    if options:
        part += definitions(options)
    for name in command.list_commands(context) if isinstance(command, click.Group) else ():
        inner = command.get_command(context, name)
        if not inner.hidden:
            part += section(inner, click.Context(inner, info_name=name, parent=context))
    return part


def paragraphs(text):
    for piece in text.split("\n\n"):
        if piece.startswith("\b"):
            yield literal(piece.removeprefix("\b").strip("\n"))
        elif piece:
            yield nodes.paragraph("", "", *inline(" ".join(piece.split())))


def literal(text):
    return nodes.literal_block(text, text, language="text")


def definitions(records):
    found = nodes.definition_list()
    for name, text in records:
        term = nodes.term("", "", nodes.literal(name, name))
        meaning = nodes.definition("", nodes.paragraph("", "", *inline(" ".join(text.split()))))
        found += nodes.definition_list_item("", term, meaning)
    return found


def setup(app):
    app.add_directive("commands", Commands)
    return {"parallel_read_safe": True}
