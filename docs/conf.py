"""How Sphinx builds these pages: `make docs`.

The pages are Markdown that GitHub shows as it is. Docstrings are Markdown too, in the style of Hugging Face;
`autodoc-process-docstring` hands Sphinx what they say as reStructuredText.
"""

import inspect
import os
import re
import sys
import textwrap
from pathlib import Path


HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from sphinx import addnodes  # noqa: E402
from transformers import TrainingArguments  # noqa: E402

import gxpo_trl  # noqa: E402


project = "gxpo_trl"
author = "the gxpo_trl authors"
version = release = gxpo_trl.__version__
language = "en"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "index"
exclude_patterns = ["images"]

# Anchors of headings are GitHub's. A link to a file outside of this folder becomes a copy of that file.
myst_heading_anchors = 4

html_theme = "furo"
html_title = f"gxpo_trl {release}"
html_copy_source = False
html_show_copyright = False

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings name the types
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
DISPLAY = re.compile(r"(?<=\n\n)((?: {4}\S.*\n)+)(?=\n)")  # indented by four after a blank line: code, in Markdown
LINK = re.compile(r"\[`(~?)([\w.]+)`\]")
CODE = re.compile(r"(?<![`\w])`([^`]+)`(?!`)")
KEPT = re.compile(r"\0(\d+)\0")
RETURNS = re.compile(r"^Returns:\n(?: {4}.*\n)+", re.MULTILINE)  # whose later lines are indented
SEVERAL = re.compile(r"^( +)((?:\w+, )+\w+)( \(.*\))?:(.*\n(?:\1 +.*\n)*)", re.MULTILINE)  # names with one description


def to_rst(docstring: str) -> str:
    """A docstring in Markdown as reStructuredText, which Napoleon can read."""
    kept: list[str] = []  # what is reStructuredText already

    def keep(text: str) -> str:
        kept.append(text)
        return f"\0{len(kept) - 1}\0"

    docstring = SEVERAL.sub(_one_by_one, docstring)
    docstring = RETURNS.sub(lambda m: m[0].replace("\n        ", "\n    "), docstring)
    docstring = FENCE.sub(lambda m: keep(_code_block(m[3], m[1], m[2])), docstring)
    head, section, rest = (*re.split(r"^(\w+:\n)", docstring, maxsplit=1, flags=re.MULTILINE), "", "")[:3]
    head = DISPLAY.sub(lambda m: keep(_code_block(m[1], "", "text") + "\n"), head)
    text = LINK.sub(lambda m: keep(_link(*m.groups())), head + section + rest)
    text = CODE.sub(lambda m: keep(f"``{m[1]}``"), text)
    text = text.replace("|", r"\|").replace("**", r"\*\*")
    return KEPT.sub(lambda m: kept[int(m[1])], text)


def _one_by_one(match: re.Match) -> str:
    indent, names, kind, description = match.groups()
    return "".join(f"{indent}{name}{kind or ''}:{description}" for name in names.split(", "))


def _code_block(text: str, indent: str, language: str) -> str:
    lines = textwrap.dedent(text).rstrip().split("\n")
    return "\n".join([f"{indent}.. code-block:: {language or 'text'}", "", *(f"{indent}    {line}" for line in lines)])


def _link(shortened: str, name: str) -> str:
    if name in gxpo_trl.__all__:
        return f":class:`~gxpo_trl.{name}`"
    return f"``{name.split('.')[-1] if shortened else name}``"


def process_docstring(app, what, name, obj, options, lines: list[str]) -> None:
    lines[:] = to_rst("\n".join(lines) + "\n").split("\n")


def restore_property(app, what, name, obj, options, lines: list[str]) -> None:
    """Napoleon takes what is before a colon in a property's docstring for its type, and here it is none."""
    if what == "property":
        lines[:] = to_rst(inspect.getdoc(obj) + "\n").split("\n")


def process_signature(app, what, name, obj, options, signature, return_annotation):
    """Configurations take the two hundred arguments of TRL's besides their own, which are documented there."""
    if what == "class" and issubclass(obj, TrainingArguments):
        return "(output_dir=None, **settings)", None
    return signature, return_annotation


def copy_outside_files(app, doctree) -> None:
    """Links to Markdown files outside of this folder, which are no pages here, lead to copies of them."""
    for link in list(doctree.findall(addnodes.pending_xref)):
        path = Path(f"{link['reftarget']}.md")
        if link.get("refdomain") == "doc" and path.is_absolute() and path.is_file():
            copy = addnodes.download_reference("", "", *link.children, reftarget=os.path.relpath(path, HERE))
            copy["refdoc"] = link["refdoc"]
            link.replace_self(copy)


def setup(app):
    app.connect("doctree-read", copy_outside_files, priority=400)  # files to be copied are collected after, at 500
    app.connect("autodoc-process-docstring", process_docstring, priority=400)  # Napoleon comes after, at 500
    app.connect("autodoc-process-docstring", restore_property, priority=600)
    app.connect("autodoc-process-signature", process_signature)
