"""`make lint` lists phrases in pages, code, recipes and notebooks, with line and remedy. Other uses of a word pass."""

import importlib.util
import json
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parents[1] / ".ci" / "phrases.py"
spec = importlib.util.spec_from_file_location("phrases", SCRIPT)
phrases = importlib.util.module_from_spec(spec)
spec.loader.exec_module(phrases)
LISTED = phrases.read_phrases(phrases.PHRASES.read_text(encoding="utf-8"))


def found(page: str) -> list[tuple[int, str]]:
    return [(line, words) for line, words, _ in phrases.find_phrases(page, LISTED)]


@pytest.mark.parametrize(
    "sentence, words",
    [
        ("The rule alone differs.", "alone"),
        ("A copy is kept beside it.", "beside"),
        ("TRL samples anew.", "anew"),
        ("The phase ends for good.", "for good"),
        ("The run goes on where it was.", "goes on"),
        ("A run that broke off.", "broke off"),
        ("Its cost is that of GRPO.", "is that of"),
        ("All of it, but for the seconds.", "but for"),
    ],
)
def test_a_listed_phrase_is_found(sentence, words):
    assert found(sentence) == [(1, words)]


@pytest.mark.parametrize(
    "sentence",
    [
        "Leave the loss out, and leave alone what works.",
        "There is a reason for good measure, besides.",
        "The tensors go on the GPU.",
        "The key `alone`, and a command:\n\n```bash\ngxpo train --goes_on `beside`\n```",
    ],
)
def test_other_uses_pass(sentence):
    assert found(sentence) == []


def test_a_phrase_over_the_end_of_a_line_has_its_first_line():
    page = "`two\nlines` of code.\nThe phase ends for\ngood. It is GRPO\nalone."
    assert found(page) == [(5, "alone"), (3, "for good")]


def test_a_line_without_a_remedy_is_an_error():
    with pytest.raises(ValueError, match="remedy"):
        phrases.read_phrases(r"\bwhilst\b")


def test_in_python_docstrings_comments_and_sentences_are_read(tmp_path):
    """Names, and strings of one or two words, are code and data."""
    source = [
        '"""The rule alone differs."""',
        "x = anew(beside=1)  # It samples anew.",
        'label = "begun anew"',
        "message = (",
        '    f"The run {x} goes "',
        '    f"on where {x} was."',
        ")",
    ]
    (tmp_path / "module.py").write_text("\n".join(source))
    assert found(phrases.read_prose(tmp_path / "module.py")) == [(1, "alone"), (2, "anew"), (5, "goes on")]


def test_in_recipes_comments_are_read_and_in_notebooks_the_text(tmp_path):
    (tmp_path / "recipe.yaml").write_text("beside: anew\nseed: 0  # It samples anew.\n")
    assert found(phrases.read_prose(tmp_path / "recipe.yaml")) == [(2, "anew")]
    cells = [
        {"cell_type": "code", "source": ["# It samples anew."]},
        {"cell_type": "markdown", "source": ["It samples\n", "anew."]},
    ]
    text = json.dumps({"cells": cells}, indent=1)
    (tmp_path / "notebook.ipynb").write_text(text)
    line = 1 + text.splitlines().index('    "anew."')
    assert found(phrases.read_prose(tmp_path / "notebook.ipynb")) == [(line, "anew")]


def test_the_files_have_none(capsys):
    assert phrases.main() == 0, capsys.readouterr().out


def test_a_page_that_has_one_fails_with_its_file_and_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "new.md").write_text("# New\n\nIt samples anew.\n")
    monkeypatch.setattr(phrases, "ROOT", tmp_path)
    assert phrases.main() == 1
    assert "docs/new.md:3: anew: again" in capsys.readouterr().out
