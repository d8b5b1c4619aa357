"""The documentation site: Sphinx, with Markdown by MyST and the Furo theme.

Sphinx rather than MkDocs: the theme that most MkDocs sites use is in maintenance since November 2025 and MkDocs
itself has had no release since; Sphinx has its releases, and API, command line and links come with it.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
for folder in (ROOT, ROOT / "host", ROOT / "device", Path(__file__).parent / "_ext"):
    sys.path.insert(0, str(folder))
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

from lance_edge import __version__  # noqa: E402

project, author, version = "lance-edge", "the authors of lance-edge", __version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "commands",
    "row_tables",
]
html_theme = "furo"
html_title = "lance-edge"
html_show_sphinx = False
smartquotes = False  # --option must stay two dashes
exclude_patterns = ["_ext"]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4  # links such as artifact.md#variants are checked
default_role = "code"  # docstrings write `name` as Markdown does
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_default_options = {"members": True, "undoc-members": False, "show-inheritance": False}
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_ivar = True
suppress_warnings = ["autodoc.mocked_object"]
linkcheck_ignore = [r"http://localhost.*"]
linkcheck_anchors = False
