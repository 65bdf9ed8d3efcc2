"""The pages say what is so: their links lead somewhere, their commands and settings exist, and their Python runs."""

import argparse
import ast
import dataclasses
import functools
import json
import re
import runpy
import shlex
import sys
import textwrap
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import urlsplit

import pytest
import trl
import yaml
from helpers import ON_CPU, RisingGateTrainer, text_reward, train
from packaging.specifiers import SpecifierSet
from sphinx.cmd.build import build_main

import gxpo_trl
from gxpo_trl import GroupedSamplingArguments, GXPOConfig, GXPOTrainer, LookaheadConfig, SFPOConfig, SFPOTrainer
from gxpo_trl.callbacks.benchmarks import BenchmarkArguments
from gxpo_trl.callbacks.trajectories import TrajectoryArguments
from gxpo_trl.evaluation.settings import EvaluationArguments
from gxpo_trl.reporting.step_costs import share_needed
from gxpo_trl.scripts import cli, demo, merge, push, recipes, report, watch
from gxpo_trl.scripts.arguments import ExtrapolationLoopArguments, ProblemArguments
from gxpo_trl.scripts.keys import GONE, parse_keys
from gxpo_trl.scripts.parsing import parse_recipe
from gxpo_trl.tasks import TINY_MODEL_PATH
from gxpo_trl.tasks.arithmetic import sample_problems
from gxpo_trl.tasks.datasets import EMBEDDED_DATASET
from gxpo_trl.tasks.names import EMBEDDED_MODEL
from gxpo_trl.tasks.rewards import maths_reward
from gxpo_trl.trajectory.settings import ExtrapolationArguments


ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "recipes" / "README.md", *DOCS]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


each_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


# ---- What is on a page

FENCE = re.compile(r"^( *)```(\S*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return [textwrap.dedent(code) for _, found, code in FENCE.findall(page.read_text()) if found == language]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def spans(page: Path) -> list[str]:
    """Code in the text, on one line each."""
    return [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose(page))]


def anchors(page: Path) -> set[str]:
    """GitHub's of a page's headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} (.+)$", prose(page), re.MULTILINE):
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        again = sum(anchor == re.sub(r"-\d+$", "", other) for other in found)
        found.add(f"{anchor}-{again}" if anchor in found else anchor)
    return found


def tables(page: Path) -> Iterator[tuple[list[str], list[list[str]]]]:
    """The header and the rows of each table."""
    for table in re.findall(r"(?:^\|.*\n)+", prose(page), re.MULTILINE):
        header, _, *rows = [
            [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.splitlines()
        ]
        yield header, rows


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


# ---- Links and citations


@each_page
def test_relative_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file(), f"{target}: there is no such file"
        assert file.is_relative_to(ROOT), f"{target} leads out of the repository"
        if anchor:
            assert anchor in anchors(file), f"{target}: headings there are {sorted(anchors(file))}"


@each_page
def test_external_links_are_well_formed(page):
    for url in re.findall(r"\w+://[^\s)>\"'`}|]+", page.read_text()):
        parts = urlsplit(url)
        if parts.hostname == "127.0.0.1":
            continue
        assert parts.scheme == "https", url
        assert re.fullmatch(r"([\w-]+\.)+[a-z]{2,}", parts.hostname), url
        assert not url.endswith((".", ",")), url


def cited() -> dict[str, str]:
    """The list of papers: titles by arXiv id."""
    rows = next(rows for header, rows in tables(ROOT / "docs" / "papers.md") if header == ["paper", "what is taken"])
    return {re.match(r"\[([\d.]+)\]", row[0])[1]: re.search(r"\*(.+?)\*", row[1])[1] for row in rows}


@each_page
def test_papers_that_are_named_are_in_the_list(page):
    text = page.read_text()
    assert set(re.findall(r"\b\d{4}\.\d{5}\b", text)) <= cited().keys()
    for label, url in re.findall(r"\[([\d.]+)\]\((https://arxiv\.org/[^)]+)\)", text):
        assert url == f"https://arxiv.org/abs/{label}"


def test_the_list_of_papers_agrees_with_the_citations_and_the_model_cards():
    (entries,) = blocks(ROOT / "docs" / "papers.md", "bibtex")
    titles = {}
    for entry in re.findall(r"^@\w+\{.*?^\}", entries, re.MULTILINE | re.DOTALL):
        title = re.search(r"title\s*=\s*\{\{(.+?)\}\}", entry)[1]
        if identifier := re.search(r"arXiv:([\d.]+)", entry):
            titles[identifier[1]] = title
    assert titles.items() <= cited().items()
    for trainer in (GXPOTrainer, SFPOTrainer):
        assert trainer._paper["title"] == cited()[trainer._paper["id"]] == titles[trainer._paper["id"]]


# ---- The README


def test_the_readme_is_short_and_leads_to_what_a_newcomer_needs():
    page = ROOT / "README.md"
    assert len(page.read_text().splitlines()) <= 140
    headings = re.findall(r"^## (.+)$", prose(page), re.MULTILINE)
    assert headings[:4] == ["Install", "First run", "Change two names", "Or use a recipe"]
    assert {"What you get", "When it pays", "Limits"} <= set(headings)
    linked = {target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", prose(page))}
    needed = {"recipes/README.md", "CONTRIBUTING.md"}
    needed |= {f"docs/{name}.md" for name in ("tasks", "evaluation", "hub", "pays", "results")}
    needed |= {f"docs/{name}.md" for name in ("faq", "features", "caveats")}
    assert needed <= linked, needed - linked


def test_figures_of_the_readme_are_those_of_the_pages():
    """Each number of a measurement, and the command that gives it."""
    pages = "\n".join(page.read_text() for page in DOCS)
    rows = next(rows for header, rows in tables(ROOT / "README.md") if header == ["what", "measured", "command"])
    assert len(rows) > 5
    for what, measured, command in rows:
        for figure in re.findall(r"(?<![\w.])\d+(?:[.,]\d+)*(?![\w])", measured):
            assert re.search(rf"(?<![\w.,]){re.escape(figure)}(?![\w]|\.\d)", pages), f"{what}: {figure}"
        for name in names(command):
            assert name in pages, f"{what}: {name}"


# ---- Python

SUBSTITUTIONS = {
    '"Qwen/Qwen2.5-1.5B-Instruct"': repr(str(TINY_MODEL_PATH)),
    'load_dataset("trl-lib/DeepMath-103K", split="train")': "gxpo_trl.tasks.load_arithmetic(64, 16)['train']",
    'load_dataset("trl-lib/Capybara", split="train")': "load_dataset('json', data_files='chats.jsonl', split='train')",
    'load_problems("MATH-500", limit=4)': "load_problems('arithmetic', limit=4)",
    '["MATH-500"]': "['problems.jsonl']",
}
"""What a snippet names that is not on this machine, and what stands for it. Nothing else of it is changed."""

SMALL = {
    **{name: ON_CPU[name] for name in ("use_cpu", "bf16", "gradient_checkpointing", "report_to", "save_strategy")},
    **{"dataloader_pin_memory": False, "disable_tqdm": True},
    **{"max_steps": 1, "per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 8},
    **{"eval_steps": 1},
}
"""And what its configurations have besides: a step of two prompts on a CPU."""

SNIPPETS = [(page, i) for page in PAGES for i in range(len(blocks(page, "python")))]


def small(config_class: type) -> type:
    class Small(config_class):
        def __init__(self, *args, **settings):
            known = {name: value for name, value in SMALL.items() if name in config_class.__dataclass_fields__}
            super().__init__(*args, **{**settings, **known})

    return Small


def write_data(folder: Path) -> None:
    """What `SUBSTITUTIONS` read: a few problems, and the same as chats."""
    problems = [{"problem": p.question, "answer": str(p.answer)} for p in sample_problems(8, "test", 0)]
    chats = [
        {"messages": [{"role": "user", "content": p["problem"]}, {"role": "assistant", "content": p["answer"]}]}
        for p in problems
    ]
    for name, rows in (("problems", problems), ("chats", chats)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    "page, i", SNIPPETS, ids=lambda value: name_of(value) if isinstance(value, Path) else str(value)
)
def test_python_runs(page, i, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)
    for config_class in (GXPOConfig, SFPOConfig, LookaheadConfig):
        monkeypatch.setattr(gxpo_trl, config_class.__name__, small(config_class), raising=False)
    for config_class in (trl.GRPOConfig, trl.RLOOConfig, trl.SFTConfig):
        monkeypatch.setattr(trl, config_class.__name__, small(config_class))
    code = blocks(page, "python")[i]
    for name, stand_in in SUBSTITUTIONS.items():
        code = code.replace(name, stand_in)
    exec(compile(code, f"{name_of(page)}, snippet {i}", "exec"), {"gxpo_trl": gxpo_trl})


# ---- Commands

PLACEHOLDER = re.compile(r"[A-Z]{2,}(\.yaml)?")
TINY_RECIPE = "recipes/tiny/gxpo.yaml"
COMMAND_OF_MODULE = {"gxpo_trl.scripts.train": "train", "gxpo_trl.scripts.eval": "eval"}
OTHER_COMMANDS = {"merge": merge, "report": report, "watch": watch, "demo": demo, "push": push, "recipes": recipes}
"""Commands whose options are not settings."""
NOT_RUN = {"pip": "installs from the network", "hf": "logs in to the Hub", "sbatch": "needs a cluster"}
NOT_RUN |= dict.fromkeys(("git", "cd"), "fetches the repository")
"""Programs of which only the words are read, and why. All other commands are parsed by their own parsers."""


def command_lines(page: Path) -> Iterator[list[str]]:
    """The words of each command, of blocks and of the text."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words
    for span in spans(page):
        if span.startswith(("gxpo ", "accelerate launch ", "python benchmarks/", "make ", "sbatch ")):
            yield shlex.split(span)


def check(words: list[str]) -> None:
    """Raises if a command could not be carried out as far as its words go. To be called in the root."""
    program, *rest = words
    if program == "gxpo":
        check_gxpo(rest[0], rest[1:])
    elif program == "accelerate":
        split = rest.index("-m")
        options = dict(zip(rest[1:split:2], rest[2:split:2], strict=True))
        assert rest[0] == "launch" and options.keys() <= {"--config_file", "--num_processes"}
        assert Path(options.get("--config_file", TINY_RECIPE)).is_file()
        check_gxpo(COMMAND_OF_MODULE[rest[split + 1]], rest[split + 2 :])
    elif program == "sbatch":
        script, _, engine = rest[rest.index("--nodes") + 2 :]
        assert Path(script).is_file() and Path(f"recipes/accelerate/{engine}.yaml").is_file()
    elif program == "python":
        if "argparse" in Path(rest[0]).read_text():
            left_over = parse_only(load_script(rest[0])["main"], rest)
            if left_over:  # benchmarks pass these on to recipes
                check_gxpo("train", ["--config", TINY_RECIPE, *left_over])
        else:
            assert Path(rest[0]).name == "run.py" or len(rest) == 1, "it has no options"
    elif program.startswith(".ci/"):
        assert Path(program).is_file() and not rest
    elif program == "make":
        assert re.search(rf"^{rest[0]}:", Path("Makefile").read_text(), re.MULTILINE)
    else:
        assert program in NOT_RUN, f"{program}: parse it, or say in NOT_RUN why it isn't run"


class Parsed(Exception):
    """A parser has accepted the words, and has left these over."""

    def __init__(self, left_over: list[str]):
        self.left_over = left_over


def parse_only(main: Callable[[], None], words: list[str]) -> list[str]:
    """Calls a command up to its parser, with these words, and returns those that the parser leaves over."""
    parse_known = argparse.ArgumentParser.parse_known_args

    def parse_known_args(parser, args=None, namespace=None):
        raise Parsed(parse_known(parser, args, namespace)[1])

    def parse_args(parser, args=None, namespace=None):
        left_over = parse_known(parser, args, namespace)[1]
        assert not left_over, f"unknown: {left_over}"
        raise Parsed([])

    known, all_known = (
        mock.patch.object(argparse.ArgumentParser, f.__name__, f) for f in (parse_known_args, parse_args)
    )
    with known, all_known, mock.patch.object(sys, "argv", words), pytest.raises(Parsed) as parsed:
        main()
    return parsed.value.left_over


@functools.cache
def load_script(path: str) -> dict[str, Any]:
    with mock.patch.object(sys, "path", [str(Path(path).parent), *sys.path]):
        return runpy.run_path(path)


def check_gxpo(command: str, arguments: list[str]) -> None:
    assert command in cli.COMMANDS
    for i in (i + 1 for i, word in enumerate(arguments) if word == "--config"):
        path = arguments[i].replace("gxpo:", "recipes/")
        arguments[i] = TINY_RECIPE if PLACEHOLDER.fullmatch(path) else path
        assert Path(arguments[i]).is_file(), f"{path}: there is no such file"
    if command == "train":
        arguments = arguments if "--config" in arguments else ["--config", TINY_RECIPE, *arguments]
        parse_recipe([*arguments, "--use_cpu", "true", "--bf16", "false"])
    elif command == "eval":
        parse_keys(arguments, (EvaluationArguments,))
    elif command == "extrapolate":
        run = arguments[:1] if arguments and not arguments[0].startswith("-") else []
        parse_keys(["--run", "RUN", *arguments[len(run) :]], (ExtrapolationArguments,))
    elif arguments:  # otherwise it is only the command's name
        left_over = parse_only(lambda: OTHER_COMMANDS[command].main(arguments), [command])
        if left_over:  # the demo passes these on to recipes
            check_gxpo("train", ["--config", TINY_RECIPE, *left_over])


@each_page
def test_commands_exist_with_their_options_and_files(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in command_lines(page):
        try:
            check(words)
        except (AssertionError, ValueError, OSError, KeyError, SystemExit) as error:
            pytest.fail(f"`{shlex.join(words)}`: {error!r}")


FOLDERS = ("recipes/", "benchmarks/", "tests/", "docs/", "gxpo_trl/")
NAMES = {EMBEDDED_MODEL, EMBEDDED_DATASET}  # which look like paths


@each_page
def test_files_that_the_text_names_exist(page):
    for span in spans(page):
        if span.startswith(FOLDERS) and not re.search(r"[\s<*]", span) and span not in NAMES:
            before, _, after = span.partition("{")
            inside, _, ending = after.partition("}")
            for name in inside.split(","):
                path = ROOT / f"{before}{name}{ending}"
                assert path.exists(), f"{span}: there is no {path}"


def test_recipes_that_are_listed_exist():
    rows = next(rows for header, rows in tables(ROOT / "docs" / "recipes.md") if header[0] == "folder")
    for folders, methods, _ in rows:
        for folder in set(names(folders)):
            listed = {name if "." in name else f"{name}.yaml" for name in names(methods)}
            there = {path.name for path in (ROOT / "recipes" / folder).iterdir()}
            assert listed <= there, folder
            if len(listed) > 1:  # methods
                assert listed == {name for name in there if name.endswith(".yaml")}, folder


# ---- Settings


def fields(*classes: type) -> set[str]:
    return {field.name for c in classes for field in dataclasses.fields(c)}


@each_page
def test_recipes_on_a_page_can_be_read(page, tmp_path):
    for i, block in enumerate(blocks(page, "yaml")):
        path = tmp_path / f"{i}.yaml"
        path.write_text(yaml.safe_dump({"output_dir": "out", "use_cpu": True, "bf16": False} | yaml.safe_load(block)))
        parse_recipe(["--config", str(path)])


def setting_tables() -> Iterator[tuple[Path, list[str], list[list[str]]]]:
    for page in [ROOT / "README.md", *DOCS]:
        for header, rows in tables(page):
            if header[0] == "setting" and header[-1] == "meaning":
                yield page, header, rows


OF_SAMPLING_AND_CALLBACKS = (GroupedSamplingArguments, BenchmarkArguments, TrajectoryArguments)


def of_the_update() -> set[str]:
    """The settings that our trainers add to TRL's."""
    return fields(LookaheadConfig) - fields(trl.GRPOConfig)


def test_settings_in_tables_exist():
    of_recipes = fields(LookaheadConfig, *OF_SAMPLING_AND_CALLBACKS, ProblemArguments, ExtrapolationLoopArguments)
    of_commands = fields(EvaluationArguments, ExtrapolationArguments)
    for page, _, rows in setting_tables():
        for name in (name for row in rows for name in names(row[0])):
            known = of_commands if name.startswith("--") else of_recipes
            assert name.removeprefix("--") in known, f"{name_of(page)}: there is no setting {name}"


def test_every_setting_is_in_a_table():
    shown = {name for page, _, rows in setting_tables() if page in DOCS for row in rows for name in names(row[0])}
    assert of_the_update() <= shown
    assert fields(*OF_SAMPLING_AND_CALLBACKS) <= shown
    assert {f"--{name}" for name in fields(EvaluationArguments)} <= shown
    assert {f"--{name}" for name in fields(ExtrapolationArguments)} - {"--run", "--base_model"} <= shown
    assert fields(ProblemArguments, ExtrapolationLoopArguments) <= shown


@each_page
def test_settings_that_are_gone_are_named_with_the_results_alone_and_as_what_they_are(page):
    said = spans(page) + blocks(page, "bash") + blocks(page, "yaml") + blocks(page, "python")
    named = {name for name in GONE if any(re.search(rf"(?<![/\w]){name}(?!\w)", code) for code in said)}
    assert not named or (page.name == "results.md" and "version 0.1.0" in page.read_text()), named


def test_the_changelog_lists_the_settings_that_are_gone():
    text = textwrap.dedent((ROOT / "CHANGELOG.md").read_text().partition("### Removed")[2].partition("\n## ")[0])
    table = re.search(r"^  \| setting \| what to do \|\n(?:  \|.*\n)+", text, re.MULTILINE)[0]
    listed = [line.split("|")[1] for line in table.splitlines()[2:]]
    assert sorted(name for cell in listed for name in names(cell)) == sorted(GONE)


def read(cell: str):
    """A default as a table says it."""
    word = cell.strip("`")
    return None if word == "none" else yaml.safe_load(re.sub(r"^(\d+)e", r"\1.0e", word))


def test_defaults_in_tables_are_those_of_the_settings():
    columns = {"GXPO": GXPOConfig, "SFPO": SFPOConfig, "default": GXPOConfig}
    for page, header, rows in setting_tables():
        for row in rows:
            if page not in DOCS or names(row[0])[0] not in of_the_update() | fields(*OF_SAMPLING_AND_CALLBACKS):
                continue
            (name,) = names(row[0])
            for column, config_class in columns.items():
                cell = row[header.index(column)] if column in header else "–"
                if cell != "–":
                    known = {
                        f.name: f for c in (config_class, *OF_SAMPLING_AND_CALLBACKS) for f in dataclasses.fields(c)
                    }
                    default = known[name].default
                    assert read(cell) == default, f"{name_of(page)}: {name} is {default} in {config_class.__name__}"


def test_the_shares_that_pay_are_computed_from_the_formula():
    header, rows = next(table for table in tables(ROOT / "docs" / "pays.md") if table[0][0] == "f")
    for f, *shares in rows:
        for column, share in zip(header[1:], shares, strict=True):
            assert share == f"{share_needed(float(column.removeprefix('c = ')), float(f)):.2f}", (f, column)


# ---- Developers


def test_versions_in_the_table_are_those_that_may_be_installed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ranges = dict(re.match(r"([\w-]+)(.*)", line).groups() for line in project["dependencies"])
    rows = next(rows for header, rows in tables(ROOT / "CONTRIBUTING.md") if header == ["package", "versions"])
    assert {"torch", "trl", "transformers"} <= {name for row in rows for name in names(row[0])}
    for package, versions in rows:
        (name,) = names(package)
        first, _, last = versions.partition(" to ")
        allowed, ends = SpecifierSet(ranges[name]), [tuple(map(int, end.split("."))) for end in (first, last or first)]
        (first_major, first_minor), (last_major, last_minor) = ends
        assert f"{first_major}.{first_minor}.0" in allowed and f"{last_major}.{last_minor}.9" in allowed, name
        assert f"{first_major}.{first_minor - 1}.9" not in allowed, name
        assert f"{last_major}.{last_minor + 1}.0" not in allowed, name


def test_the_tree_is_that_of_the_package():
    (tree,) = blocks(ROOT / "CONTRIBUTING.md", "text")
    lines = re.findall(r"^( *)(.+?)(?:  +.*|)$", tree, re.MULTILINE)
    package, room, listed = ROOT / "gxpo_trl", "", {}
    for indent, what in lines[1:-1]:
        for name in what.split(", "):
            path = package / (name if len(indent) == 2 else f"{room}/{name}")
            assert path.exists(), path
            if len(indent) == 2 and name.endswith("/"):
                room = name.rstrip("/")
            listed.setdefault(room if len(indent) > 2 else "", set()).add(name.rstrip("/"))
    here = {path.name for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert listed.pop("") == here
    for room, files in listed.items():  # those whose files are listed: all of them
        assert files == {path.name for path in (package / room).glob("*.py")} - {"__init__.py"}, room
    assert all((ROOT / folder).is_dir() for folder in "".join(lines[-1]).split())


# ---- What pages say of the code


def lines_of(file: Path) -> int:
    return len(file.read_text().splitlines())


def imports_of(file: Path) -> tuple[set[str], set[str]]:
    """The libraries that a file of the package imports, and the files of the package, by their path in it."""
    package, libraries, ours = ROOT / "gxpo_trl", set(), set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            libraries |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            libraries.add(node.module.partition(".")[0])
        elif isinstance(node, ast.ImportFrom):
            origin = file.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            module = origin.with_suffix(".py")
            ours.add(module if module.is_file() else origin / "__init__.py")
    return libraries - set(sys.stdlib_module_names), {str(path.relative_to(package)) for path in ours}


def test_the_parts_for_trl_are_described_as_they_are():
    """Their lines to within a twentieth, and exactly what they import."""
    listed = [row for header, rows in tables(ROOT / "docs" / "for-trl.md") for row in rows if header[0] == "file"]
    assert len(listed) > 5
    for (name,), lines, libraries, ours, tests in ((names(row[0]), *row[1:]) for row in listed):
        file = ROOT / "gxpo_trl" / name
        assert int(lines) == pytest.approx(lines_of(file), rel=0.05), f"{name}: {lines_of(file)} lines"
        assert (set(names(libraries)), set(names(ours))) == imports_of(file), name
        for test in names(tests):
            assert (ROOT / "tests" / test).is_file(), test
    listed = [row for header, rows in tables(ROOT / "docs" / "for-trl.md") for row in rows if header[0] == "tests"]
    for (name,), lines, _ in ((names(row[0]), *row[1:]) for row in listed):
        assert int(lines) == pytest.approx(lines_of(ROOT / "tests" / name), rel=0.05), name
    here = {path.name for path in (ROOT / "tests").glob("test_*_contract.py")}
    assert here <= {names(row[0])[0] for row in listed}


def test_features_are_shown_by_tests_and_sentences_that_are_there():
    page = ROOT / "docs" / "features.md"
    sources = [path.read_text() for path in (ROOT / "tests").glob("test_*.py")]
    defined = set(re.findall(r"^def (test_\w+)", "\n".join(sources), re.MULTILINE))
    named = {span for span in spans(page) if span.startswith("test_")}
    assert len(named) > 20 and named <= defined, named - defined
    said = {
        node.value
        for path in (ROOT / "gxpo_trl").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    rows = [row for header, rows in tables(page) if header[1:] == ["here", "shown by"] for row in rows]
    quoted = [sentence for row in rows for sentence in re.findall(r'"([^"]+)"', row[-1])]
    assert len(quoted) > 8
    for sentence in quoted:
        assert any(sentence in text for text in said), f"nothing says: {sentence}"
    assert all(row[-1] or row[1].endswith("not run") or row[1] == "none" for row in rows)


# ---- Metrics

ELSEWHERE = {"lookahead/peak_memory", "lookahead/cos_check", "lookahead/vllm_adapter_share"}
ELSEWHERE |= {"lookahead/retention", "lookahead/true_error_scaled", "lookahead/true_cosine_scaled"}


def documented() -> set[str]:
    page = ROOT / "docs" / "metrics.md"
    return {name for header, rows in tables(page) if header[0] == "metric" for row in rows for name in names(row[0])}


def test_the_page_of_metrics_has_those_that_a_run_logs(tmp_path):
    settings = {"lookahead_diagnostics_steps": 1, "gate_warmup_steps": 0, "beta": 0.01, "max_steps": 4}
    settings |= {"step_control": "cosine"}
    evaluation = {"eval_benchmarks": ["arithmetic"], "eval_steps": 4, "eval_samples": 2}
    rewards = [maths_reward, text_reward]  # the second has spread in every group
    trainer = train(tmp_path, RisingGateTrainer, scripted=False, reward=rewards, **settings, **evaluation)
    keys = {key for entry in trainer.state.log_history for key in entry}
    ours = {key for key in keys if key.startswith(("lookahead/", "eval/", "verify_"))}
    logged = {key.replace("/arithmetic/", "/<benchmark>/").replace("@2", "@n") for key in ours}
    assert logged - documented() == set(), "logged, and not on the page"
    assert documented() - logged == ELSEWHERE, "on the page, and not logged"


@each_page
def test_metrics_that_a_page_names_are_logged(page):
    named = {span for span in spans(page) if re.fullmatch(r"(lookahead|eval)/[\w/<>@]+", span)}
    assert named <= documented()


# ---- Sphinx


@pytest.mark.filterwarnings("ignore::sphinx.deprecation.RemovedInSphinx11Warning")
def test_sphinx_builds_the_pages_without_a_warning(tmp_path, capsys):
    failed = build_main(["-W", "--keep-going", "-q", "-b", "html", str(ROOT / "docs"), str(tmp_path / "html")])
    assert not failed, capsys.readouterr().err
    assert {f"{page.stem}.html" for page in DOCS} <= {path.name for path in (tmp_path / "html").glob("*.html")}
    reference = (tmp_path / "html" / "api.html").read_text()
    for public in set(gxpo_trl.__all__) - {"__version__"}:
        assert f'id="gxpo_trl.{public}"' in reference
    assert "lr_scheduler_type" not in reference  # TRL's arguments are TRL's to document
