"""The pages say what is so: their links lead somewhere, their commands and settings exist, and their Python runs."""

import contextlib
import dataclasses
import io
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from urllib.parse import urlsplit

import pytest
import trl
import yaml
from helpers import ON_CPU, RisingGateTrainer, text_reward, train
from sphinx.cmd.build import build_main

import gxpo_trl
from gxpo_trl import GroupedSamplingArguments, GXPOConfig, GXPORLOOConfig, GXPOTrainer, SFPOConfig, SFPOTrainer
from gxpo_trl.evaluation.settings import EvaluationArguments
from gxpo_trl.scripts import cli, demo, push, recipes, report, watch
from gxpo_trl.scripts.arguments import ExtrapolationLoopArguments, ProblemArguments
from gxpo_trl.scripts.keys import parse_keys
from gxpo_trl.scripts.parsing import parse_recipe
from gxpo_trl.tasks import TINY_MODEL_PATH
from gxpo_trl.tasks.datasets import EMBEDDED_DATASET
from gxpo_trl.tasks.names import EMBEDDED_MODEL
from gxpo_trl.tasks.rewards import maths_reward
from gxpo_trl.trainer.config import LookaheadArguments, LookaheadConfig
from gxpo_trl.trajectory.settings import ExtrapolationArguments


ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "recipes" / "README.md", *DOCS]


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
    entries = "\n".join(blocks(ROOT / "README.md", "bibtex"))
    for entry in re.findall(r"^@\w+\{.*?^\}", entries, re.MULTILINE | re.DOTALL):
        title = re.search(r"title\s*=\s*\{\{(.+?)\}\}", entry)[1]
        if identifier := re.search(r"arXiv:([\d.]+)", entry):
            assert cited()[identifier[1]] == title
    for trainer in (GXPOTrainer, SFPOTrainer):
        assert cited()[trainer._paper["id"]] == trainer._paper["title"]


# ---- Python

SUBSTITUTIONS = {
    '"Qwen/Qwen2.5-1.5B-Instruct"': repr(str(TINY_MODEL_PATH)),
    'load_dataset("trl-lib/DeepMath-103K", split="train")': "gxpo_trl.tasks.load_arithmetic(64, 16)['train']",
    'load_problems("MATH-500", limit=4)': "load_problems('arithmetic', limit=4)",
}
"""What a snippet names that is not on this machine, and what stands for it. Nothing else of it is changed."""

SMALL = {
    **{name: ON_CPU[name] for name in ("use_cpu", "bf16", "gradient_checkpointing", "report_to", "save_strategy")},
    **{"dataloader_pin_memory": False, "disable_tqdm": True},
    **{"max_steps": 1, "per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 8},
}
"""And what its configurations have besides: a step of two prompts on a CPU."""

SNIPPETS = [(page, i) for page in PAGES for i in range(len(blocks(page, "python")))]


def small(config_class: type) -> type:
    class Small(config_class):
        def __init__(self, *args, **settings):
            super().__init__(*args, **{**settings, **SMALL})

    return Small


@pytest.mark.parametrize(
    "page, i", SNIPPETS, ids=lambda value: name_of(value) if isinstance(value, Path) else str(value)
)
def test_python_runs(page, i, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trl, "RLOOConfig", small(trl.RLOOConfig))
    for config_class in (GXPOConfig, SFPOConfig, LookaheadConfig, GXPORLOOConfig):
        monkeypatch.setattr(gxpo_trl, config_class.__name__, small(config_class), raising=False)
    code = blocks(page, "python")[i]
    for name, stand_in in SUBSTITUTIONS.items():
        code = code.replace(name, stand_in)
    exec(compile(code, f"{name_of(page)}, snippet {i}", "exec"), {"gxpo_trl": gxpo_trl})


# ---- Commands

PLACEHOLDER = re.compile(r"[A-Z]{2,}(\.yaml)?")
TINY_RECIPE = "recipes/tiny/gxpo.yaml"
COMMAND_OF_MODULE = {"gxpo_trl.scripts.train": "train", "gxpo_trl.scripts.eval": "eval"}
OTHER_COMMANDS = {"report": report, "watch": watch, "demo": demo, "push": push, "recipes": recipes}
"""Commands whose options are no settings."""


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
        source = Path(rest[0]).read_text()
        of_recipes = [word for word in rest if word.startswith("--") and f'"{word}"' not in source]
        for option in of_recipes:  # benchmarks hand them on
            check_gxpo("train", ["--config", TINY_RECIPE, option, rest[rest.index(option) + 1]])
    elif program == "make":
        assert re.search(rf"^{rest[0]}:", Path("Makefile").read_text(), re.MULTILINE)
    else:
        assert words[:2] == ["pip", "install"]


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
    else:
        assert {word for word in arguments if word.startswith("--")} <= options_of(OTHER_COMMANDS[command])


def options_of(module: ModuleType) -> set[str]:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
        module.main(["--help"])
    return set(re.findall(r"--\w+", shown.getvalue()))


@each_page
def test_commands_exist_with_their_options_and_files(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in command_lines(page):
        try:
            check(words)
        except (AssertionError, ValueError, OSError, KeyError) as error:
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
            assert listed <= {path.name for path in (ROOT / "recipes" / folder).iterdir()}, folder


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


def test_settings_in_tables_exist():
    of_recipes = fields(LookaheadConfig, GroupedSamplingArguments, ProblemArguments, ExtrapolationLoopArguments)
    of_commands = fields(EvaluationArguments, ExtrapolationArguments)
    for page, _, rows in setting_tables():
        for name in (name for row in rows for name in names(row[0])):
            known = of_commands if name.startswith("--") else of_recipes
            assert name.removeprefix("--") in known, f"{name_of(page)}: there is no setting {name}"


def test_every_setting_is_in_a_table():
    shown = {name for page, _, rows in setting_tables() if page in DOCS for row in rows for name in names(row[0])}
    assert fields(LookaheadArguments) <= shown
    assert {f"--{name}" for name in fields(EvaluationArguments)} <= shown
    assert {f"--{name}" for name in fields(ExtrapolationArguments)} - {"--run", "--base_model"} <= shown
    assert fields(GroupedSamplingArguments, ProblemArguments, ExtrapolationLoopArguments) <= shown


def read(cell: str):
    """A default as a table says it."""
    word = cell.strip("`")
    return None if word == "none" else yaml.safe_load(re.sub(r"^(\d+)e", r"\1.0e", word))


def test_defaults_in_tables_are_those_of_the_settings():
    columns = {"GXPO": GXPOConfig, "SFPO": SFPOConfig, "default": GXPOConfig}
    for page, header, rows in setting_tables():
        for row in rows:
            if page not in DOCS or names(row[0])[0] not in fields(LookaheadArguments, GroupedSamplingArguments):
                continue
            (name,) = names(row[0])
            for column, config_class in columns.items():
                cell = row[header.index(column)] if column in header else "–"
                if cell != "–":
                    known = config_class.__dataclass_fields__ | GroupedSamplingArguments.__dataclass_fields__
                    default = known[name].default
                    assert read(cell) == default, f"{name_of(page)}: {name} is {default} in {config_class.__name__}"


# ---- Metrics

ON_GPUS = {"lookahead/peak_memory"}


def documented() -> set[str]:
    page = ROOT / "docs" / "metrics.md"
    return {name for header, rows in tables(page) if header[0] == "metric" for row in rows for name in names(row[0])}


def test_the_page_of_metrics_has_those_that_a_run_logs(tmp_path):
    settings = {"lookahead_diagnostics_steps": 1, "gate_warmup_steps": 0, "beta": 0.01, "max_steps": 4}
    evaluation = {"eval_benchmarks": ["arithmetic"], "eval_steps": 4, "eval_samples": 2}
    rewards = [maths_reward, text_reward]  # the second has spread in every group
    trainer = train(tmp_path, RisingGateTrainer, scripted=False, reward=rewards, **settings, **evaluation)
    keys = {key for entry in trainer.state.log_history for key in entry}
    ours = {key for key in keys if key.startswith(("lookahead/", "eval/", "verify_"))}
    logged = {key.replace("/arithmetic/", "/<benchmark>/").replace("@2", "@n") for key in ours}
    assert logged - documented() == set(), "logged, and not on the page"
    assert documented() - logged == ON_GPUS, "on the page, and not logged"


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
