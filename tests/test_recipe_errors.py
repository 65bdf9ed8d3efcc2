"""Recipes and command lines that are wrong: one sentence with file, line, key and what was expected, and no folder."""

import dataclasses
import math
import os
import re
import typing
from pathlib import Path

import pytest
import yaml
from mutate_recipes import cases, run

from gxpo_trl.scripts import cli
from gxpo_trl.scripts.bounds import BOUNDS, Choices
from gxpo_trl.scripts.parsing import parse_recipe
from gxpo_trl.tasks.code import PERMISSION
from gxpo_trl.values import read_value


TINY = (Path(__file__).parents[1] / "recipes" / "tiny" / "grpo.yaml").read_text()


def write(folder: Path, *lines: str) -> Path:
    """The tiny recipe with other values of its keys, or with keys that it does not have."""
    text = TINY
    for line in lines:
        key = line.partition(":")[0]
        text = re.sub(rf"^{re.escape(key)}: .*\n", "", text, flags=re.MULTILINE) + f"{line}\n"
    (folder / "r.yaml").write_text(text, encoding="utf-8")
    return folder / "r.yaml"


def parse(path: Path, *words: str):
    return parse_recipe(["--config", str(path), *words])


def refusal(path: Path, *words: str) -> str:
    """What is said of a recipe, after its path. It is one line."""
    with pytest.raises(ValueError) as caught:
        parse(path, *words)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(str(path))


# ---- The file


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", " is empty"),
        (b"# nothing\n\n", " is empty"),
        (b"- a\n- b\n", ", line 1: expected keys, .* got a list"),
        (b"\njust words\n", ", line 2: expected keys, .* got one value"),
        (b"seed: 1\nbeta: [1, 2\n", ", line 3: no YAML: .*expected ',' or ']'"),
        (b"seed: 1\n\tbeta: 2\n", ", line 2: no YAML: .*tab|, line 2: no YAML: .*'.t'"),
        (b"seed: 1\n---\nseed: 2\n", ", line 2: no YAML: expected a single document"),
        (b"seed: 1\nbeta: *there\n", ", line 2: no YAML: found undefined alias 'there'"),
        (b"seed: 1\nbeta: \xff\xfe\n", ", line 2: expected text in UTF-8"),
        (b"seed: 1\nbeta: \x07\n", r", line 2: '\\x07' can't be in YAML"),
        (b'seed: 1\nrun_name: "a\\0b"\n', ", line 2: expected text, got"),
        (b'seed: 1\nrun_name: "\\ud800"\n', ", line 2: expected text, got"),
        (b"seed: " + b"[" * 4000, " is nested too deep"),
        (b"x: " + b"y" * 400_000, " is larger than"),
        (b"seed: 1\nbeta: &a [*a]\n", ", line 2: an alias names what it is in"),
        (b"a: &a [1, 1]\n" + b"".join(b"b%d: &b%d [*%s, *%s]\n" % (i, i, n, n) for i, n in enumerate(
            [b"a", *(b"b%d" % i for i in range(40))])), ": a recipe has fewer than 100,000 values"),
        (b"seed: 1\nbeta: 0\nseed: 1\n", ", line 3: `seed` is there twice, first in line 1"),
        (b"model_init_kwargs:\n  a: 1\n  a: 2\n", ", line 3: `a` is there twice, first in line 2"),
        (b"seed: 1\non: 2\n", ", line 2: expected the name of a setting, got `on`"),
        (b"5: 2\n", ", line 1: expected the name of a setting, got `5`"),
        (b"null: 2\n", ", line 1: expected the name of a setting, got `null`"),
        (b"2024-01-01: 2\n", ", line 1: expected the name of a setting, got `2024-01-01`"),
        (b"? [a, b]\n: 2\n", ", line 1: expected the name of a setting, got a list or a mapping"),
        (b"seed: 1\nhelp: true\n", ", line 2: Unknown key `help` in the recipe"),
        (b"seed: 1\nconfig: x\n", ", line 2: Unknown key `config` in the recipe"),
        (b"origin: x\n", ", line 1: Unknown key `origin` in the recipe"),
        (b"seed: 1\nlearning-rate: 1\n", ", line 2: Unknown key `learning-rate` in the recipe; did you mean"),
        (b"seed: !!python/object:os.system {}\n", ", line 1: `seed`: could not determine a constructor"),
        (b"seed: !!int foo\n", ", line 1: `seed`: to YAML this is of type int"),
        (b"seed: 2024-13-45\n", ", line 1: `seed`: to YAML this is of type timestamp"),
        (b"<<: 5\n", ", line 1: no YAML"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_recipe_says_where(tmp_path, content, said):
    (tmp_path / "r.yaml").write_bytes(content)
    assert re.match(said, refusal(tmp_path / "r.yaml"))


def test_what_is_no_file_is_said(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path, said in (
        (tmp_path, "is not a file"),
        (tmp_path / "fifo", "is not a file"),
        (tmp_path / "x", "can't be read"),
    ):
        assert said in refusal(path)
    assert "--config r.yaml" in refusal(write(tmp_path), "r.yaml")


def test_yaml_is_taken_as_it_is_written(tmp_path):
    """Anchors, merged keys, a byte order mark; one name for a list; numbers that are strings to YAML; a bare `no`."""
    path = write(tmp_path, "reward_funcs: arithmetic_reward", "learning_rate: 1e-5", "eval_strategy: no")
    path.write_text(f"\ufeff{path.read_text()}", encoding="utf-8")
    with path.open("a", encoding="utf-8") as file:
        file.write(
            'run_name: &name "text"\nsystem_prompt: *name\n<<: {weight_decay: 0.5, beta: 7}\nscale_rewards: no\n'
        )
        file.write(
            "model_init_kwargs: '{\"a\": 1}'\nlora_target_modules: all-linear\nuse_peft: on\nreward_weights: 2\n"
        )
        file.write("gate_window: '31'\nmax_active_steps: null\n")
    recipe = parse(path)
    args = recipe.training
    assert recipe.script.reward_funcs == ["arithmetic_reward"] and recipe.model.lora_target_modules == "all-linear"
    assert (args.learning_rate, args.weight_decay, args.beta) == (1e-5, 0.5, 0.0)
    assert (args.eval_strategy, args.scale_rewards, args.gate_window, args.reward_weights) == ("no", "none", 31, [2])
    assert recipe.problems.system_prompt == "text" and args.model_init_kwargs == {"a": 1}
    (tmp_path / "again.yaml").write_text(recipe.text)
    again = parse(tmp_path / "again.yaml").training
    assert (again.learning_rate, again.eval_strategy, again.scale_rewards) == (1e-5, "no", "none")


# ---- Values


@pytest.mark.parametrize(
    "line, expected",
    [
        *((f"lookahead_steps: {value}", "a whole number") for value in ("null", "[1]", "{a: 1}", "2024-01-01", "5.7")),
        *((f"lookahead_steps: {value}", "a whole number") for value in ("true", ".nan", ".inf", "1e30", "''", 10**30)),
        *((f"num_generations: {value}", "a whole number") for value in ("5.7", "true", "5.0", "eight", "[8]")),
        *((f"lora_r: {value}", "a whole number") for value in ("5.7", "false", "null")),
        *((f"learning_rate: {value}", "a number") for value in ("null", "[1]", "2024-01-01", "true", ".nan", "fast")),
        *((f"use_peft: {value}", "true or false") for value in ("null", "2", "maybe", "[true]")),
        *((f"output_dir: {value}", "a string or null") for value in ("[a]", "{a: b}", "2024-01-01", "5", "true")),
        *((f"model_revision: {value}", "a string") for value in ("null", "[a]", "1.0")),
        ("reward_funcs: {a: 1}", "a list of strings or null"),
        ("reward_funcs: [1]", "a list of strings or null"),
        ("eval_benchmarks: [[a]]", "a list of strings or null"),
        ("reward_weights: [1, a]", "a list of numbers or null"),
        ("optim: adamw_torc", "one of 'adamw_torch', .*did you mean `adamw_torch`"),
        ("save_strategy: true", "one of 'no', 'steps', 'epoch', 'best'"),
        ("generation_kwargs: [a]", "a mapping, a string or null"),
        ("generation_kwargs: '{'", "a mapping, a string or null, got '{', which is not JSON"),
        ("generation_kwargs: {1: 2}", "a mapping, a string or null"),
        ("liger_kernel_config: {rope: often}", "a mapping or null"),
        ("datasets: [{pth: x}]", "path, .*did you mean `path`"),
        ("datasets: [{name: x}]", "`path` in each"),
        ("learning_rate: -1", "a finite number of at least 0"),
        ("learning_rate: .inf", "a finite number of at least 0"),
        ("temperature: 0", "a finite number above 0"),
        ("top_p: 1.5", "a number above 0 and at most 1"),
        ("adam_beta1: 1", "a number of at least 0 and below 1"),
        ("per_device_train_batch_size: 0", "a finite number of at least 1"),
        ("num_generations: 1", "a finite number of at least 2"),
        ("seed: -1", "a number of at least 0 and at most"),
        ("lora_dropout: -0.1", "a number of at least 0"),
        ("loss_type: drgrpo", "one of 'grpo', .*did you mean `dr_grpo`"),
        ("scale_rewards: groups", "one of 'group', 'batch', 'none', got groups; did you mean `group`"),
        ("importance_sampling_level: word", "one of 'token', 'sequence', got word"),
        ("multi_objective_aggregation: mean", "one of 'sum_then_normalize', 'normalize_then_sum'"),
        ("vllm_importance_sampling_mode: clip", "one of 'token_truncate'"),
    ],
)
def test_a_value_of_another_type_or_out_of_bounds_says_what_was_expected(tmp_path, line, expected):
    path, key = write(tmp_path, line), line.partition(":")[0]
    number = path.read_text().splitlines().index(line) + 1
    assert re.match(f", line {number}: `{key}`: expected {expected}", refusal(path))


@pytest.mark.parametrize(
    "lines, named",
    [
        (["gate_window: 1"], "gate_window"),
        (["update_rule: gpxo"], "update_rule"),
        (["num_generations: 7"], "num_generations"),
        (["load_in_4bit: true", "load_in_8bit: true"], None),
        (["generation_batch_size: 5"], "generation_batch_size"),
        (["accelerator_config: {foo: 1}"], None),
    ],
)
def test_what_a_dataclass_refuses_is_one_sentence_with_the_line_of_what_it_names(tmp_path, lines, named):
    path = write(tmp_path, *lines)
    said = refusal(path)
    number = path.read_text().splitlines().index(lines[0]) + 1
    assert said.startswith(f", line {number}: " if named else ": ") and (named or "") in said


@pytest.mark.parametrize(
    "words, said",
    [
        (["--lookahead_steps", "many"], "`lookahead_steps`: expected a whole number, got 'many'"),
        (["--lookahead-steps=5.5"], "`lookahead_steps`: expected a whole number, got '5.5'"),
        (["--learning_rate", "nan"], "`learning_rate`: expected a number, got 'nan'"),
        (["--learning_rate"], "`learning_rate`: expected one argument"),
        (["--top_p", "0"], "`top_p`: expected a number above 0 and at most 1, got 0.0"),
        (["--use_peft", "maybe"], "`use_peft`: expected true or false"),
        (["--optim", "adam"], "`optim`: expected one of"),
        (["--dry-run", "perhaps"], "`dry_run`: expected true or false"),
        (["--gate_window", "1"], "`gate_window` must be"),
        (["--run_name", "\udcff"], "expected text in UTF-8"),
        (
            ["--reward_funcs", "a", "--seed", "1", "--reward_funcs", "b"],
            "`reward_funcs` is given twice.*`--reward_funcs A B`",
        ),
        (["--config", "other.yaml"], "`--config` is given twice. Name one recipe."),
    ],
)
def test_the_command_line_is_named_as_such(tmp_path, words, said):
    assert re.match(f"the command line: {said}", refusal(write(tmp_path), *words))


@pytest.mark.parametrize(
    "words, said",
    [
        (["--lora_r", "8"], "`lora_r` does nothing without `use_peft`. Set `use_peft: true`, or leave it out."),
        (["--use-dora", "true"], "`use_dora` does nothing without `use_peft`"),
        (["--vllm_mode", "colocate"], "`vllm_mode` does nothing without `use_vllm`"),
        (["--eval_samples", "8"], "`eval_samples` does nothing without `eval_benchmarks`"),
        (["--extrapolate_alpha", "2"], "`extrapolate_alpha` does nothing without `extrapolate_after`"),
    ],
)
def test_a_setting_of_what_is_off_is_refused(tmp_path, words, said):
    path = write(tmp_path)
    assert refusal(path, *words).startswith(f"the command line: {said}")
    key = words[0].removeprefix("--").replace("-", "_")
    lines = path.read_text() + f"\n{key}: {words[1]}\n"
    path.write_text(lines)
    assert refusal(path).startswith(f", line {len(lines.splitlines())}: {said}")
    switch = re.search("without `(\\w+)`", said)[1]
    value = "null" if switch in ("eval_benchmarks", "extrapolate_after") else "false"
    parse_recipe(["--config", str(path), f"--{switch}", value])  # somebody has turned it off


def test_of_a_value_that_is_given_twice_the_last_counts(tmp_path):
    assert parse(write(tmp_path), "--seed", "1", "--learning_rate=1e-3", "--seed=2").training.seed == 2


def test_a_list_in_pieces_is_refused_by_every_command(capsys):
    with pytest.raises(SystemExit, match="`models` is given twice. Give all in one: `--models A B`"):
        cli.main(["eval", "--models", "a", "--models", "b"])


def test_the_place_of_a_fault_in_the_code_names_no_setting(tmp_path):
    recipe = parse(write(tmp_path), "--dry_run", "true")
    try:
        exec(compile("[][0]", "scripts/dry_run.py", "exec"))
    except IndexError as error:
        assert recipe.origin.explain(error).startswith(f"{tmp_path / 'r.yaml'}: IndexError: list index out of range (")


def test_without_a_recipe_the_error_names_one():
    with pytest.raises(ValueError, match="Name a recipe: `--config gxpo:tiny/gxpo.yaml`"):
        parse_recipe([])


@pytest.mark.parametrize("word, value", [("-inf", -math.inf), ("-1e-1", -0.1), ("-2", -2.0), ("-.5", -0.5)])
def test_negative_numbers_are_no_keys(tmp_path, word, value):
    assert parse(write(tmp_path), "--retention_min", word).training.retention_min == value


@pytest.mark.parametrize(
    "words, modules",
    [
        (["q_proj"], ["q_proj"]),
        (["self_attn.q_proj"], ["self_attn.q_proj"]),
        (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        (["all-linear"], "all-linear"),
        ([".*[qv]_proj"], ".*[qv]_proj"),
    ],
    ids=str,
)
def test_one_module_is_a_list_of_one(tmp_path, words, modules):
    """PEFT takes a text for a pattern of whole paths."""
    recipe = parse(write(tmp_path), "--use_peft", "true", "--lora_target_modules", *words)
    assert recipe.model.lora_target_modules == modules
    assert dataclasses.replace(recipe.model, lora_r=4).lora_target_modules == modules


def test_none_is_a_word_for_numbers_only(tmp_path):
    path = write(tmp_path, "max_active_steps: 5")
    recipe = parse(path, "--max_active_steps", "null", "--report_to", "none", "--run_name", "null")
    assert (recipe.training.max_active_steps, recipe.training.report_to, recipe.training.run_name) == (
        None,
        [],
        "null",
    )


@pytest.mark.parametrize(
    "value, kind, read",
    [
        ("1e-5", float, 1e-5),
        (3, float, 3),
        ("inf", float, float("inf")),
        ("7", int | None, 7),
        ("none", int | None, None),
        ("none", str | None, "none"),
        (1, bool, True),
        ("off", str, "off"),
        ("a", list[str] | None, ["a"]),
        ((1, 2), list[int], [1, 2]),
        ({"a": True}, dict[str, bool], {"a": True}),
        ('{"a": true}', dict[str, bool], {"a": True}),
        ("x.json", dict | str | None, "x.json"),
        ({"a": "1e-6", "b": ["-2.5E3", "e5", "1e"]}, dict | str | None, {"a": 1e-6, "b": [-2500.0, "e5", "1e"]}),
        ({"a": {"b": "9e-1"}}, dict[str, typing.Any] | None, {"a": {"b": 0.9}}),
        ({"a": "1e-6"}, dict[str, str], {"a": "1e-6"}),
    ],
)
def test_words_are_read_by_what_is_meant(value, kind, read):
    found = read_value(value, kind)
    assert found == read and type(found) is type(read)


def test_bounds_are_those_of_fields_that_there_are_and_defaults_are_within():
    for owner, bounds in BOUNDS.items():
        fields = {field.name: field for field in dataclasses.fields(owner)}
        for name, bound in bounds.items():
            default, said = fields[name].default, fields[name].metadata["help"]
            assert default is None or bound.hold(default), name
            assert not isinstance(bound, Choices) or all(f"{text}'" in said for text in bound.texts), name


# ---- The environment


@pytest.mark.parametrize(
    "name",
    [
        PERMISSION,
        PERMISSION.lower(),
        "PYTHONPATH",
        "PYTHONSTARTUP",
        "LD_PRELOAD",
        "LD_LIBRARY_PATH",
        "PATH",
        "HF_HOME",
    ],
)
def test_a_recipe_sets_no_variable_that_decides_which_code_runs(tmp_path, monkeypatch, name):
    monkeypatch.setattr(os, "environ", {**os.environ, name: "before"})
    assert re.match(
        rf", line \d+: `env`: `{name}` decides which code runs", refusal(write(tmp_path, f"env: {{{name}: 1}}"))
    )
    assert os.environ[name] == "before"


@pytest.mark.parametrize("env", ["[a]", "5", "{1: 2}", "{a=b: c}", "{'': c}", "{A: [1]}", "{A: null}"])
def test_an_environment_that_is_none_is_refused(tmp_path, env):
    assert re.match(r", line \d+: `env`: expected", refusal(write(tmp_path, f"env: {env}")))


def test_a_recipe_sets_other_variables_and_none_if_it_is_refused(tmp_path, monkeypatch):
    for name in ("WANDB_PROJECT", "GXPO_TEST"):
        monkeypatch.setenv(name, "before")
    refusal(write(tmp_path, "env: {WANDB_PROJECT: mine}", "seed: x"))
    assert os.environ["WANDB_PROJECT"] == "before"
    parse(write(tmp_path, "env: {WANDB_PROJECT: mine, GXPO_TEST: 1}"))
    assert (os.environ["WANDB_PROJECT"], os.environ["GXPO_TEST"]) == ("mine", "1")


# ---- What is left


@pytest.mark.parametrize(
    "line, words",
    [
        ("eval_benchmarks: [nothing]", []),
        ("generation_token_budget: -5", []),
        ("reward_funcs: nowhere.py:f", ["--dry-run"]),
        ("optim_args: nonsense", ["--dry-run"]),
        ("lr_scheduler_type: cosine_with_min_lr", []),
    ],
)
def test_nothing_is_left_of_what_failed(tmp_path, monkeypatch, line, words):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, line, "output_dir: out/run", "eval_strategy: no", "max_steps: 1")
    for _ in range(2):  # the first is not in the way of the second
        with pytest.raises(SystemExit, match=f"^error: {re.escape(str(path))}") as ended:
            cli.main(["train", "--config", str(path), *words])
        assert "\n" not in ended.value.code
        assert [found.name for found in tmp_path.iterdir()] == ["r.yaml"]


@pytest.mark.parametrize("words", [[], ["--dry-run"]], ids=["run", "rehearsal"])
def test_a_model_that_is_not_there_is_named(tmp_path, words):
    path = write(tmp_path, f"model_name_or_path: {tmp_path}/nowhere", f"output_dir: {tmp_path}/run")
    with pytest.raises(SystemExit, match=f"^error: {path}, line .*: `model_name_or_path`: .*no folder .*nowhere"):
        cli.main(["train", "--config", str(path), *words])
    for name, said in (("./elsewhere", "there is no folder ./elsewhere"), (str(tmp_path), "is not a checkpoint")):
        with pytest.raises(SystemExit, match=f"^error: the command line: `model_name_or_path`: .*{said}"):
            cli.main(["train", "--config", str(path), "--model_name_or_path", name, *words])


@pytest.mark.parametrize(
    "word, message",
    [
        ("--report_to foo", "foo is not supported, only wandb is."),
        ("--dataset_name data/no.jsonl", "There is no file data/no.jsonl."),
        ("--run_name mine", "What is 'mine'?"),
    ],
)
def test_an_error_that_names_a_value_is_placed_at_its_setting(tmp_path, word, message):
    explained = parse(write(tmp_path), *word.split()).origin.explain(ValueError(message))
    assert explained == f"the command line: `{word.split()[0][2:]}`: {message}"


@pytest.mark.parametrize("word, message", [("--report_to none", "none of it"), ("--run_name it", "none of it")])
def test_an_error_that_has_a_value_as_a_word_is_not(tmp_path, word, message):
    assert parse(write(tmp_path), *word.split()).origin.explain(ValueError(message)).endswith(f"r.yaml: {message}")


def test_a_folder_that_was_there_stays(tmp_path):
    (tmp_path / "run").mkdir()
    path = write(tmp_path, "eval_benchmarks: [nothing]", f"output_dir: {tmp_path}/run")
    with pytest.raises(SystemExit, match="line .*`eval_benchmarks`: .*nothing"):
        cli.main(["train", "--config", str(path)])
    assert (tmp_path / "run").is_dir()


def test_an_output_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    for place in ("file", "file/run"):
        path = write(tmp_path, f"output_dir: {tmp_path}/{place}")
        with pytest.raises(
            SystemExit, match=f"`output_dir: {tmp_path}/{place}` can't be created: .*/file is not a folder"
        ):
            cli.main(["train", "--config", str(path)])


def test_evaluation_can_be_turned_off(tmp_path):
    """The tiny recipes evaluate before the first step as well."""
    assert yaml.safe_load(TINY)["eval_on_start"]
    path = write(tmp_path, "eval_strategy: no", f"output_dir: {tmp_path}/run", "max_steps: 1")
    cli.main(["train", "--config", str(path)])
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_a_model_that_cannot_be_read_ends_an_evaluation_in_one_sentence(tmp_path):
    (tmp_path / "config.json").write_text("[]")
    words = ["--benchmarks", "arithmetic", "--limit", "1", "--output_dir", str(tmp_path / "eval")]
    with pytest.raises(SystemExit, match="^error: .+") as ended:
        cli.main(["eval", "--models", str(tmp_path), *words])
    assert "\n" not in ended.value.code


@pytest.mark.parametrize(
    "words, said",
    [
        (["--models", "/nowhere/x"], "`models`: there is no folder /nowhere/x"),
        (["--models", "."], "`models`: . is not a checkpoint: it holds neither a config.json nor an adapter_config"),
        (["--dtype", "float13"], "`dtype` must be 'auto' or a type of torch such as 'bfloat16', got 'float13'"),
        (["--dtype", "nn"], "`dtype` must be 'auto' or a type of torch"),
        (["--output_dir", "file"], "`output_dir: file` can't be created: .*/file is not a folder"),
    ],
)
def test_an_evaluation_that_cannot_work_names_the_setting(tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    models = [] if "--models" in words else ["--models", "gxpo_trl/tiny"]
    with pytest.raises(SystemExit, match=f"^error: .*{said}"):
        cli.main(["eval", *models, "--benchmarks", "arithmetic", "--limit", "1", *words])


def test_a_report_that_cannot_be_written_names_the_setting(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="^error: `out: .*/file` can't be created: .*/file is not a folder"):
        cli.main(["report", str(tmp_path), "--out", str(tmp_path / "file")])


# ---- By the hundred


def check_mutated(tmp_path: Path, count: int, seed: int) -> None:
    kinds = []
    for i, (name, text, words) in enumerate(cases(count, seed)):
        folder = tmp_path / str(i)
        folder.mkdir()
        outcome = run(text, words, folder)
        assert outcome.kind in ("works", "sentence"), (i, name, words, outcome)
        kinds.append(outcome.kind)
    assert set(kinds) == {"works", "sentence"}


def test_mutated_recipes_work_or_end_in_one_sentence(tmp_path):
    check_mutated(tmp_path, 40, seed=3)


@pytest.mark.slow
def test_many_mutated_recipes_work_or_end_in_one_sentence(tmp_path):
    check_mutated(tmp_path, 500, seed=4)
