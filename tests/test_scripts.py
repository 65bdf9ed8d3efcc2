"""The commands, as their users type them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from matplotlib.image import imread

from gxpo_trl import GXPOTrainer, LookaheadTrainer, SFPOTrainer
from gxpo_trl.scripts import cli, demo
from gxpo_trl.scripts.arguments import replace_training
from gxpo_trl.scripts.building import build_trainer
from gxpo_trl.scripts.keys import GONE
from gxpo_trl.scripts.parsing import parse_recipe
from gxpo_trl.scripts.recipes import recipe_names
from gxpo_trl.scripts.running import leave_recipe


RECIPES = Path(__file__).parents[1] / "recipes" / "tiny"
FEW = ["--max_steps", "3", "--per_device_eval_batch_size", "400", "--eval_steps", "2", "--gate_warmup_steps", "0"]


def recipe(name: str) -> list[str]:
    return ["--config", str(RECIPES / f"{name}.yaml")]


@pytest.mark.parametrize("name", ["sfpo", "gxpo"])
def test_the_recipes_differ_in_the_update_rule_alone(name):
    grpo, other = (yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text()) for recipe in ("grpo", name))
    different = {key for key in grpo.keys() | other.keys() if grpo.get(key) != other.get(key)}
    assert different - {"update_rule", "output_dir"} == {
        *("lookahead_steps", "reposition_alpha", "gate_signal", "gate_threshold", "gate_window", "gate_warmup_steps"),
    }


def test_what_a_recipe_leaves_out_has_the_defaults_of_its_rule(tmp_path):
    for rule, steps, signal in (("gxpo", 5, "grad_norm"), ("sfpo", 3, "entropy")):
        path = tmp_path / f"{rule}.yaml"
        path.write_text(f"output_dir: out\nuse_cpu: true\nbf16: false\nupdate_rule: {rule}\n")
        args = parse_recipe(["--config", str(path)]).training
        assert (args.lookahead_steps, args.gate_signal) == (steps, signal)
        args = parse_recipe(["--config", str(RECIPES / "next.yaml"), "--update-rule", rule]).training
        assert (args.lookahead_steps, args.gate_signal) == (steps, signal)


def test_the_command_line_overrides_the_recipe():
    args = parse_recipe([*recipe("gxpo"), "--lookahead_steps", "7", "--scale_max", "inf"]).training
    assert args.lookahead_steps == 7
    assert args.scale_max == float("inf")
    assert args.reposition_alpha == 0.5


def test_the_update_rule_chooses_the_trainer():
    for name, trainer_class in (("gxpo", GXPOTrainer), ("sfpo", SFPOTrainer), ("grpo", LookaheadTrainer)):
        assert type(build_trainer(parse_recipe(recipe(name)))) is trainer_class


def test_recipes_sample_in_groups_unless_they_say_otherwise():
    def sampling(*options: str):
        return build_trainer(parse_recipe([*recipe("grpo"), *options]))._generate_single_turn.__self__

    assert type(sampling()).__name__ == "GroupedSampling"
    assert sampling("--generation_token_budget", "300").settings.generation_token_budget == 300
    assert type(sampling("--generation_backend", "transformers")) is LookaheadTrainer
    with pytest.raises(ValueError, match="Leave out `generation_token_budget`"):
        sampling("--generation_backend", "transformers", "--generation_token_budget", "300")


@pytest.mark.parametrize(
    "key, nearest", [("lookahead_step", "lookahead_steps"), ("reposition_alfa", "reposition_alpha")]
)
def test_an_unknown_key_names_the_nearest(tmp_path, key, nearest):
    path = tmp_path / "recipe.yaml"
    path.write_text((RECIPES / "gxpo.yaml").read_text() + f"\n{key}: 1\n")
    with pytest.raises(ValueError, match=f"`{key}` in the recipe; did you mean `{nearest}`"):
        parse_recipe(["--config", str(path)])
    with pytest.raises(ValueError, match=f"`{key}` in the command line; did you mean `{nearest}`"):
        parse_recipe([*recipe("gxpo"), f"--{key}", "1"])


@pytest.mark.parametrize("key", GONE)
def test_a_key_that_is_gone_says_what_to_do(tmp_path, key):
    path = tmp_path / "recipe.yaml"
    path.write_text((RECIPES / "gxpo.yaml").read_text() + f"\n{key}: 1\n")
    with pytest.raises(ValueError, match=f"`{key}` in the recipe is gone: .*(Leave|Set|Raise)"):
        parse_recipe(["--config", str(path)])
    for option in (f"--{key}", f"--{key.replace('_', '-')}", f"--no_{key}"):
        with pytest.raises(ValueError, match="in the command line is gone"):
            parse_recipe([*recipe("gxpo"), option])


def test_a_recipe_of_the_wrong_shape_is_one_sentence(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text((RECIPES / "gxpo.yaml").read_text().replace("lookahead_steps: 5", "lookahead_steps: 0"))
    finished = gxpo("train", "--config", str(path))
    assert finished.returncode == 1
    assert finished.stderr.strip().splitlines()[-1].startswith(f"error: {path}, line 11: `lookahead_steps` must be")
    with pytest.raises(SystemExit, match="missing.yaml"):
        cli.main(["train", "--config", str(tmp_path / "missing.yaml")])


@pytest.mark.parametrize(
    "missing, message",
    [("dataset_name", "no data"), ("model_name_or_path", "no model"), ("reward_funcs", "no reward")],
)
def test_a_recipe_without_its_essentials_is_refused(tmp_path, missing, message):
    settings = yaml.safe_load((RECIPES / "gxpo.yaml").read_text())
    del settings[missing]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    with pytest.raises(ValueError, match=message):
        build_trainer(parse_recipe(["--config", str(path)]))


def test_an_evaluation_split_that_the_data_lacks_is_named():
    """Problem sets have problems to train on and no other split."""
    arguments = [*recipe("gxpo"), "--dataset_name", "arithmetic", "--eval_strategy", "steps"]
    with pytest.raises(ValueError, match="split `test`, and the data has train.*`eval_benchmarks`"):
        build_trainer(parse_recipe(arguments))


def gxpo(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "gxpo_trl.scripts.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
def test_accelerate_launch_trains_saves_and_resumes(tmp_path):
    """The launch line of docs/recipes.md with LoRA on top; then the same line again with more steps."""
    few = ["--eval_strategy", "no", "--eval_on_start", "false", "--save_strategy", "steps", "--save_steps", "2"]
    lora = ["--use_peft", "--lora_r", "8", "--lora_target_modules", "all-linear", "--learning_rate", "1e-3"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    command = [*launch, "-m", "gxpo_trl.scripts.train", *recipe("gxpo"), *few, *lora]
    command += ["--output_dir", str(tmp_path), "--resume_from_checkpoint", "last"]
    for steps in (2, 4):
        finished = subprocess.run([*command, "--max_steps", str(steps)], capture_output=True, text=True, timeout=240)
        assert finished.returncode == 0, finished.stderr
        assert (tmp_path / "adapter_model.safetensors").is_file()
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert [entry["lookahead/backward_passes"] for entry in state["log_history"] if "loss" in entry] == [3, 6, 9, 12]
    assert "2605.06755" in (tmp_path / "README.md").read_text()


@pytest.mark.slow
def test_the_demo_compares_and_draws(tmp_path, capsys):
    demo.main(["--output_dir", str(tmp_path), *FEW], prog="gxpo demo")
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]
    table = {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}
    assert table["GRPO"]["backward passes"] == "3"
    assert table["SFPO"]["backward passes"] in ("9", "12")  # the gate may fire in the third step, not before
    assert table["GXPO"]["backward passes"] in ("7", "9")  # shut off after step 2 at the earliest
    assert table["SFPO"]["rollouts"] == table["GXPO"]["rollouts"] == table["GRPO"]["rollouts"] == "384"
    assert len({row["pass@1 at start"] for row in table.values()}) == 1
    path = tmp_path / "comparison.png"
    assert str(path) in printed
    assert imread(path).std() > 0.05  # something is drawn


def test_the_commands_explain_themselves(capsys):
    finished = gxpo("--help")
    assert finished.returncode == 0 and "usage: gxpo" in finished.stdout, finished.stderr
    for command in ("train", "demo"):
        with pytest.raises(SystemExit) as ended:
            cli.main([command, "--help"])
        printed = capsys.readouterr().out
        assert ended.value.code == 0 and f"usage: gxpo {command}" in printed
        assert ("lookahead_steps" in printed) == (command == "train")


# ---- The recipe that stays with a run


def test_no_secret_is_left_with_a_run(tmp_path):
    (tmp_path / "r.yaml").write_text("env: {GXPO_TEST: hf_one}\nhub_token: hf_two\nuse_cpu: true\nbf16: false\n")
    arguments = ["--config", str(tmp_path / "r.yaml"), "--hub_token", "hf_three", "--output_dir", str(tmp_path)]
    assert "hf_" not in parse_recipe(arguments).text


def test_settings_that_become_objects_are_written_as_a_file_would_say_them(tmp_path):
    options = ["--accelerator_config", '{"split_batches": false}', "--debug", "underflow_overflow"]
    arguments = ["--config", "gxpo:tiny/gxpo.yaml", "--output_dir", str(tmp_path), *options]
    said = parse_recipe(arguments)
    leave_recipe(said, tmp_path)
    again = parse_recipe(["--config", str(tmp_path / "recipe.yaml")]).training
    assert not again.accelerator_config.split_batches and again.debug == said.training.debug != []


@pytest.mark.parametrize(
    "options",
    [
        ["--learning_rate", "3e-5", "--scale_max", "inf", "--eval_strategy", "steps", "--report_to", "none"],
        ["--eval-benchmarks", "arithmetic", "--reward_funcs", "arithmetic_reward", "boxed_format_reward"],
        ["--use_peft", "--lora_target_modules=all-linear", "--no_compact_batches", "--max_active_steps", "3"],
        ["--prompts_per_step", "8", "--gradient_accumulation_steps", "2", "--dry-run"],
    ],
)
def test_one_file_says_what_recipe_and_command_line_say(tmp_path, options):
    arguments = ["--config", "gxpo:tiny/gxpo.yaml", "--output_dir", str(tmp_path), *options]
    said = parse_recipe(arguments)
    leave_recipe(said, tmp_path)
    again = parse_recipe(["--config", str(tmp_path / "recipe.yaml")])
    assert not again.rehearsal.dry_run
    for one, other in zip(said.parts[:-1], again.parts[:-1], strict=True):
        assert all_of(one) == all_of(other)
    assert again.text == (tmp_path / "recipe.yaml").read_text()


# ---- Recipes that differ from another


def all_of(part) -> dict[str, str]:
    """What was given and what was made of it."""
    return {name: str(value) for name, value in vars(part).items() if name != "distributed_state"}


@pytest.mark.parametrize("name", recipe_names())
def test_training_arguments_can_be_replaced_as_if_they_had_been_given_so(name):
    arguments = ["--config", f"gxpo:{name}", "--use_cpu", "true"]
    args = parse_recipe(arguments).training
    assert all_of(replace_training(args)) == all_of(args)
    changes = {"max_steps": 7, "seed": 3, "output_dir": "elsewhere", "eval_strategy": "no", "save_strategy": "no"}
    words = [word for key, value in changes.items() for word in (f"--{key}", str(value))]
    assert all_of(replace_training(args, **changes)) == all_of(parse_recipe([*arguments, *words]).training)


def test_what_follows_from_a_replaced_setting_is_made_again():
    args = parse_recipe([*recipe("grpo"), "--prompts_per_step", "16"]).training
    assert (args.gradient_accumulation_steps, args.steps_per_generation) == (4, 4)
    halved = replace_training(args, prompts_per_step=8)
    assert (halved.gradient_accumulation_steps, halved.generation_batch_size) == (
        2,
        128,
    )  # lasts for as long as it did
    twice = replace_training(args, generation_batch_size=256)
    assert (twice.gradient_accumulation_steps, twice.steps_per_generation) == (4, 8)
    assert args.do_eval and not replace_training(args, eval_strategy="no").do_eval


def test_what_callbacks_were_told_is_recorded_as_a_setting(tmp_path):
    options = ["--eval_benchmarks", "arithmetic", "--eval_samples", "2", "--generation_token_budget", "9000"]
    options += ["--eval_strategy", "no", "--eval_on_start", "false", "--max_steps", "1", "--prompt", "Solve {problem}"]
    options += ["--problem_column", "prompt", "--answer_column", "solution", "--eval_steps", "9"]
    build_trainer(parse_recipe([*recipe("grpo"), *options, "--output_dir", str(tmp_path)])).train()
    about = json.loads((tmp_path / "run.json").read_text())
    told = {"eval_benchmarks": ["arithmetic"], "eval_samples": 2, "generation_token_budget": 9000}
    told |= {"eval_prompt": "Solve {problem}"}  # that of the training data
    assert told.items() <= about["settings"].items() and told.items() <= about["changed"].items()
    assert "trajectory_steps" not in about["settings"]
