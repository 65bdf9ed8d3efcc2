"""The recipes of the package: what they compute, that they differ in their rule alone, and that each can be run."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from gxpo_trl.scripts import recipes, train
from gxpo_trl.scripts.next_loop import check_loop
from gxpo_trl.scripts.parsing import parse_recipe
from gxpo_trl.scripts.plan import describe_plan
from gxpo_trl.scripts.recipes import recipe_names, recipe_path
from gxpo_trl.tasks import resolve_reward
from gxpo_trl.tasks.datasets import PROBLEM_SETS, problem_set
from gxpo_trl.tasks.generated import is_generated
from gxpo_trl.trainer.config import accumulation_steps
from gxpo_trl.update.step_control import MOST_TRIES


ROOT = Path(__file__).parents[1]
NAMES = recipe_names()
RULE = {"update_rule", "lookahead_steps", "reposition_alpha", "active_threshold"}
RULE |= {"step_control", "gate_signal", "gate_threshold", "gate_window", "gate_warmup_steps", "output_dir"}
IN_MINIBATCHES = {"generation_batch_size", "steps_per_generation", "prompts_per_step", "max_steps"}
IN_MINIBATCHES |= {"per_device_train_batch_size", "gradient_accumulation_steps"}
IN_MINIBATCHES |= {"logging_steps", "eval_steps", "save_steps"}  # what makes several optimizer steps of a batch
OVER_GRPO = {"loss_type", "beta", "epsilon_high", "reward_funcs"}  # what makes GRPO DAPO
OF_A_MODEL = {"model_name_or_path", "per_device_train_batch_size", "vllm_gpu_memory_utilization", "output_dir"}
OF_A_CONTEXT = {"max_completion_length", "vllm_max_model_length", "reward_funcs"}
OF_A_BATCH = {"gradient_accumulation_steps", "steps_per_generation", "generation_batch_size"}

GXPO_MODELS = ("qwen2.5-1.5b-instruct", "qwen2.5-3b-instruct", "qwen2.5-7b-instruct", "llama-3.2-3b-instruct")
SFPO_MODELS = ("qwen2.5-math-1.5b", "qwen2.5-math-7b", "deepseek-r1-distill-qwen-1.5b", "deepseek-r1-distill-qwen-7b")
SFPO_MODELS += ("qwen3-4b-base",)
NEXT_MODELS = (*GXPO_MODELS[:3], "qwen2.5-14b-instruct")
GXPO_METHODS = ("grpo", "sfpo", "gxpo")
SFPO_METHODS = ("grpo", "sfpo", "dapo", "dapo_sfpo")
HOME = ("t4", "24gb", "80gb", "8x80gb")
REAL = "smollm2-135m"
MADE = {f"out/{REAL}/{split}.jsonl" for split in ("train", "test")}
"""By its `prepare.py`, as its model is: `tests/test_real_model.py` rehearses it with them."""


def read(name: str) -> dict:
    return yaml.safe_load(recipe_path(f"gxpo:{name}").read_text())


def parse(name: str, *options: str):
    return parse_recipe(["--config", f"gxpo:{name}", "--use_cpu", "true", *options])


def differing(first: str, second: str) -> set[str]:
    a, b = read(first), read(second)
    return {key for key in a.keys() | b.keys() if a.get(key) != b.get(key)}


def test_there_is_one_for_every_setting():
    expected = {f"{model}/{method}.yaml" for model in GXPO_MODELS for method in GXPO_METHODS}
    expected |= {f"{model}/{method}.yaml" for model in SFPO_MODELS for method in SFPO_METHODS}
    expected |= {f"{model}/next.yaml" for model in NEXT_MODELS}
    expected |= {f"{machine}/{method}.yaml" for machine in HOME for method in ("grpo", "gxpo", "step-control")}
    expected |= {f"tiny/{method}.yaml" for method in ("grpo", "sfpo", "gxpo", "next")}
    expected |= {f"{folder}/check.yaml" for folder in (*HOME, "tiny")}
    expected |= {f"{folder}/step-control.yaml" for folder in (*GXPO_MODELS, *SFPO_MODELS, REAL, "tiny")}
    expected |= {"reasoning-gym/gxpo.yaml"}
    expected |= {f"{REAL}/grpo.yaml", f"{REAL}/gxpo.yaml"}
    assert set(NAMES) == expected


# ---- What they say


@pytest.mark.parametrize("folder", [*GXPO_MODELS, *SFPO_MODELS, *HOME, REAL, "tiny"])
def test_methods_of_one_folder_differ_in_the_rule_alone(folder):
    for name in NAMES:
        method = name.removeprefix(f"{folder}/").removesuffix(".yaml")
        if name.startswith(f"{folder}/") and method not in ("grpo", "next"):
            allowed = RULE | (OVER_GRPO if method.startswith("dapo") else set())
            allowed |= IN_MINIBATCHES if method == "check" else set()
            assert {"output_dir"} <= differing(f"{folder}/grpo.yaml", name) <= allowed, name
    if f"{folder}/dapo.yaml" in NAMES:
        assert differing(f"{folder}/dapo.yaml", f"{folder}/dapo_sfpo.yaml") <= RULE


@pytest.mark.parametrize("folder", [*HOME, "tiny"])
def test_a_check_is_of_the_same_batches_in_several_steps(folder):
    """As many batches as the other recipes have, logged and evaluated after as many."""
    plain, checked = parse(f"{folder}/grpo.yaml").training, parse(f"{folder}/check.yaml").training
    assert checked.generation_batch_size == plain.generation_batch_size
    steps = checked.steps_of_batch
    assert steps == (2 if folder == "t4" else 4) and plain.steps_of_batch == 1
    for name in ("max_steps", "logging_steps", "eval_steps", "save_steps"):
        assert getattr(checked, name) == steps * getattr(plain, name) or checked.save_strategy == "no"
    assert checked.generation_batch_size / steps >= 32


@pytest.mark.parametrize(
    "models, methods, allowed",
    [
        (GXPO_MODELS, (*GXPO_METHODS, "step-control"), OF_A_MODEL),
        (SFPO_MODELS, (*SFPO_METHODS, "step-control"), OF_A_MODEL | OF_A_CONTEXT),
        (NEXT_MODELS, ("next",), OF_A_MODEL),
    ],
    ids=["gxpo", "sfpo", "next"],
)
def test_models_of_one_paper_differ_in_what_depends_on_the_model_alone(models, methods, allowed):
    for method in methods:
        for model in models[1:]:
            assert differing(f"{models[0]}/{method}.yaml", f"{model}/{method}.yaml") <= allowed


GXPO_PAPER = {"lora_r": 128, "lora_alpha": 256, "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
GXPO_PAPER |= {"bf16": True, "learning_rate": 1e-7, "max_grad_norm": 1.0, "epsilon": 0.2, "beta": 0.001}
GXPO_PAPER |= {"max_completion_length": 3072, "vllm_max_model_length": 4096, "max_steps": 300, "temperature": 1.0}
GXPO_PAPER |= {"prompts_per_step": 128, "num_generations": 5, "dataset_name": "MATH-3to5", "loss_type": "grpo"}
SFPO_PAPER = {"prompts_per_step": 256, "num_generations": 8, "max_steps": 400, "temperature": 1.0, "use_peft": None}
SFPO_PAPER |= {"dataset_name": "DAPO-Math-17k+MATH-train"}
NEXT_PAPER = {"lora_r": 64, "lora_alpha": 32, "learning_rate": 5e-6, "prompts_per_step": 32, "num_generations": 8}
NEXT_PAPER |= {"generation_batch_size": 128 * 8, "max_completion_length": 4096, "dataset_name": "DAPO-Math-17k"}
NEXT_PAPER |= {"extrapolate_alpha": 1.5, "temperature": 1.0, "top_p": 1.0}


def test_they_say_what_the_papers_say():
    """method.md, section 3; a batch of the NExt paper is four optimizer steps."""
    for model in GXPO_MODELS:
        for method in GXPO_METHODS:
            settings = read(f"{model}/{method}.yaml")
            assert {key: settings.get(key) for key in GXPO_PAPER} == GXPO_PAPER
            if method != "grpo":
                alpha, tau = {"gxpo": (0.5, 0.5), "sfpo": (0.5, 2.0)}[settings["update_rule"]]
                assert (settings["reposition_alpha"], settings["gate_threshold"]) == (alpha, tau)
                assert (settings["update_rule"], settings["lookahead_steps"]) == (method, 5)
    for model in SFPO_MODELS:
        for method in SFPO_METHODS:
            settings = read(f"{model}/{method}.yaml")
            assert {key: settings.get(key) for key in SFPO_PAPER} == SFPO_PAPER
            assert settings["vllm_max_model_length"] == (4096 if "math" in model else 8192)
            if "sfpo" in method:
                assert (settings["lookahead_steps"], settings["reposition_alpha"]) == (3, 0.8)
    for model in NEXT_MODELS:
        settings = read(f"{model}/next.yaml")
        assert {key: settings.get(key) for key in NEXT_PAPER} == NEXT_PAPER
        batches = {key: settings[key] / 4 for key in ("trajectory_steps", "extrapolate_after", "max_steps")}
        assert batches == {"trajectory_steps": 10, "extrapolate_after": 150, "max_steps": 250}
        assert settings["extrapolate_steps_ahead"] == 5 * settings["trajectory_steps"]


@pytest.mark.parametrize("k", [3, 5, 10])
@pytest.mark.parametrize("method", ["sfpo", "gxpo"])
@pytest.mark.parametrize("model", GXPO_MODELS)
def test_each_k_of_the_gxpo_paper_is_the_recipe_with_another_k(model, method, k):
    """Key by key, as the run would get them; and the bound of the scale follows."""
    recipe = parse(f"{model}/{method}.yaml", "--lookahead_steps", str(k))
    settings, of_the_file = recipe.settings(), parse(f"{model}/{method}.yaml").settings()
    paper = GXPO_PAPER | {"lookahead_steps": k, "reposition_alpha": 0.5, "update_rule": method, "use_peft": True}
    paper |= {"gate_signal": "grad_norm", "gate_threshold": 0.5, "active_threshold": 1e-8} if method == "gxpo" else {}
    paper |= {"gate_signal": "entropy", "gate_threshold": 2.0} if method == "sfpo" else {}
    assert {key: settings[key] for key in paper} == paper
    differing = {key for key in settings if settings[key] != of_the_file[key]}
    assert differing == (set() if k == 5 else {"lookahead_steps"})
    extrapolation = recipe.training.lookahead_rule().extrapolation
    assert extrapolation.scale_max == k / 2 + 1 if method == "gxpo" else extrapolation is None


@pytest.mark.parametrize("method", ["sfpo", "gxpo"])
@pytest.mark.parametrize("model", GXPO_MODELS)
def test_it_names_the_commands_of_the_other_k(model, method):
    """At its head, with a folder of their own."""
    text = re.sub(r" \\\n#\s+", " ", recipe_path(f"gxpo:{model}/{method}.yaml").read_text())
    commands = [shlex.split(line)[2:] for line in re.findall(r"^#\s+(gxpo train .*)$", text, re.MULTILINE)]
    assert {tuple(words[:2]) for words in commands} == {("--config", f"gxpo:{model}/{method}.yaml")}
    found = [parse_recipe([*words, "--use_cpu", "true"]).training for words in commands]
    places = {args.lookahead_steps: args.output_dir for args in found}
    assert places == {k: f"out/{model}/{method}_k{k}" for k in (3, 10)}


DEFINING = ("loss_type", "beta", "epsilon", "num_generations", "temperature", "max_completion_length", "learning_rate")
DEFINING += ("lr_scheduler_type", "max_grad_norm", "max_steps", "seed", "update_rule", "reward_funcs", "bf16")


@pytest.mark.parametrize("name", NAMES)
def test_what_defines_the_method_is_written_out(name):
    settings = read(name)
    assert not set(DEFINING) - settings.keys()
    if not name.startswith("tiny/"):
        assert not {
            "num_iterations",
            "scale_rewards",
            "importance_sampling_level",
            "top_p",
            "weight_decay",
            "dtype",
        } - (settings.keys())


@pytest.mark.parametrize("name", NAMES)
def test_the_real_parser_takes_it_and_its_names_exist(name, tmp_path):
    recipe = parse(name, "--output_dir", str(tmp_path))
    for part in recipe.script.dataset_name.split("+"):
        assert part == "gxpo_trl/arithmetic" or is_generated(part) or part in MADE or problem_set(part)
    benchmarks = recipe.benchmarks.eval_benchmarks or []
    assert all(name in PROBLEM_SETS or is_generated(name) or name in MADE for name in benchmarks)
    assert all(callable(resolve_reward(reward)) for reward in recipe.script.reward_funcs or [])
    if recipe.loop.extrapolate_after is not None:
        check_loop(recipe)
    assert "backward passes" in describe_plan(recipe)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("tiny/")])
def test_the_batch_is_the_same_on_any_number_of_gpus(name):
    settings = read(name)
    shape = settings["prompts_per_step"], settings["num_generations"], settings["per_device_train_batch_size"]
    for devices in (1, 2, 4, 8) if name.split("/")[0] not in ("t4", "24gb", "80gb", REAL) else (1,):
        steps = accumulation_steps(*shape, devices)
        assert devices * steps * shape[2] == shape[0] * shape[1]
        sampled = settings.get("generation_batch_size", shape[0] * shape[1])
        assert sampled % (devices * shape[2]) == 0


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("tiny/")])
def test_it_names_the_command_that_runs_it(name):
    text = recipe_path(f"gxpo:{name}").read_text()
    command = re.sub(r" \\\n#\s+", " ", text)
    assert f"--config recipes/{name}\n" in command
    for engine in re.findall(r"--config_file (\S+)", command):
        assert (ROOT / engine).is_file()


def test_a_prompt_count_that_does_not_come_out_even_is_refused_with_one_that_does():
    with pytest.raises(ValueError, match="Set `per_device_train_batch_size` to 10"):
        accumulation_steps(128, 5, 12, 4)
    with pytest.raises(ValueError, match="can't be dealt to 3 processes"):
        accumulation_steps(128, 5, 10, 3)
    with pytest.raises(ValueError, match="`gradient_accumulation_steps: 4` contradicts `prompts_per_step: 8`"):
        parse("t4/gxpo.yaml", "--gradient_accumulation_steps", "4")
    with pytest.raises(ValueError, match="prompts_per_step"):
        parse("t4/gxpo.yaml", "--prompts_per_step", "0")


# ---- The plan

QWEN = {"model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28}
QWEN |= {"num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True}
FROZEN = 1_543_714_304  # what Qwen2.5-1.5B has
TRAINED = 28 * 128 * 2 * ((1536 + 1536) + (1536 + 256))  # q and o, k and v: two thin matrices of rank 128 each


def plan(tmp_path, name: str, *options: str) -> str:
    """Of a recipe on a model of the shape of Qwen2.5-1.5B, of which there is the configuration alone."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    return describe_plan(parse(name, "--model_name_or_path", str(tmp_path), *options))


def mib(count: float) -> str:
    return f"{count / 2**20:.1f} MiB"


def test_the_plan_says_what_a_run_takes(tmp_path):
    text = plan(tmp_path, "qwen2.5-1.5b-instruct/gxpo.yaml")
    assert "128 prompts × 5 completions = 640 completions" in text
    assert "128 on 1, 64 on 2, 32 on 4, 16 on 8 devices" in text
    assert f"{51 * 3 + 249} to {300 * 3} backward passes in all; GRPO has 300" in text  # the gate opens after 50 steps
    assert "192,000 completions, at most 589.8 million tokens" in text
    assert f"{(FROZEN + TRAINED) / 1e6:,.1f} million parameters, {TRAINED / 1e6:.1f} million trained" in text
    assert f"frozen weights {2 * FROZEN / 2**30:.1f} GiB" in text
    moments = copies = f"{mib(8 * TRAINED)}"
    assert f"gradients {mib(4 * TRAINED)}, Adam's moments {moments}, copies of an active step {copies}\n" in text
    logits = 5 * 3072 * 151936 * 4 / 2**30
    assert f"in fp32: {logits:.1f} GiB" in text and "vLLM takes 30% of each GPU" in text


@pytest.mark.parametrize(
    "options, said",
    [
        (["--gate_signal", "never"], "900 backward passes in all; GRPO has 300"),
        (["--max_active_steps", "60"], f"{51 * 3 + 249} to {60 * 3 + 240} backward passes"),
        (["--update_rule", "sfpo", "--lookahead_steps", "3"], f"{51 * 4 + 249} to 1,200 backward passes"),
        (["--update_rule", "grpo"], "1 a step: 300 backward passes in all"),
        (["--update_rule", "check"], f"{300 * (1 + 2 / 128):,.0f} backward passes in all; GRPO has 300"),
        (
            ["--update_rule", "check", "--generation_batch_size", "1920"],
            f"micro-batches in every 3 steps: {300 + 100 * 2 / 128:,.0f} backward passes in all",
        ),
        (["--gate_warmup_steps", "0"], f"{3 * 3 + 297} to 900 backward passes"),  # the third has two to compare with
        (["--lookahead_diagnostics_steps", "5"], "(and 5 in every 5th active step for diagnostics"),
        (["--dtype", "float32"], f"frozen weights {4 * FROZEN / 2**30:.1f} GiB"),
        (["--dtype", "auto"], f"frozen weights {4 * FROZEN / 2**30:.1f} GiB"),  # the configuration names none
        (["--load_in_8bit", "true"], f"frozen weights {FROZEN / 2**30:.1f} GiB"),
        (["--load_in_4bit", "true"], f"frozen weights {mib(FROZEN / 2)}"),
        (["--num_iterations", "2"], "96,000 completions, at most 294.9 million tokens"),
        (
            ["--use_vllm", "false"],
            f"640 completions on a device, up to {640 * 3072 * 28 * 2 * 2 * 128 * 2 / 2**30:.1f}",
        ),
        (
            ["--use_vllm", "false", "--generation_token_budget", "10000"],
            f"up to {mib(10000 * 28 * 2 * 2 * 128 * 2)}",
        ),
        (["--vllm_mode", "server"], "vLLM's server"),
    ],
)
def test_the_plan_follows_the_settings(tmp_path, options, said):
    assert said in plan(tmp_path, "qwen2.5-1.5b-instruct/gxpo.yaml", *options)


def test_the_plan_counts_the_reference_of_full_fine_tuning(tmp_path):
    assert "reference model" in plan(tmp_path, "qwen2.5-math-1.5b/grpo.yaml")
    assert "reference model" not in plan(tmp_path, "qwen2.5-math-1.5b/dapo.yaml")
    assert "copies" not in plan(tmp_path, "qwen2.5-math-1.5b/grpo.yaml")


def test_a_model_that_cannot_be_read_is_said(tmp_path):
    assert "the configuration of Qwen/Qwen2.5-1.5B-Instruct can't be read" in describe_plan(parse("24gb/gxpo.yaml"))


# ---- Running them in small


IN_SHORT = ["24gb/gxpo.yaml", "tiny/grpo.yaml"]
"""With adapters and without; `make slow` rehearses each kind, the loop too."""


def dry_run(name: str, folder: Path, capsys, *options: str) -> str:
    arguments = ["--config", f"gxpo:{name}", "--dry-run", "--output_dir", str(folder / "run"), *options]
    train.main([*arguments, "--disable_tqdm", "true"])
    assert not list(folder.iterdir())
    return capsys.readouterr().out


def check_rehearsal(name: str, printed: str, **overridden) -> None:
    settings = read(name) | overridden
    k = settings.get("lookahead_steps")
    probes = {"grpo": 0, "check": 1, "gxpo": min(k or 0, 2), "sfpo": k}[settings["update_rule"]]
    steps = 1 if "extrapolate_after" in settings else 3
    (last,) = (line for line in printed.splitlines() if line.startswith("Rehearsed"))
    passes = int(re.search(r"(\d+) backward passes", last).group(1))
    controls = settings["update_rule"] == "check" or "step_control" in settings
    tries = 1 + (MOST_TRIES if controls else 0)  # of a step: one in three has no advantage
    assert f"{steps} steps" in last and steps + min(probes, 1) <= passes <= steps + 2 * probes * tries


@pytest.mark.parametrize("name", IN_SHORT)
def test_it_can_be_carried_out_in_small(name, tmp_path, capsys):
    check_rehearsal(name, dry_run(name, tmp_path, capsys))


@pytest.mark.parametrize("method, k", [("sfpo", 3), ("gxpo", 10)])
def test_another_k_can_be_carried_out_in_small(method, k, tmp_path, capsys):
    name = f"{GXPO_MODELS[0]}/{method}.yaml"
    check_rehearsal(name, dry_run(name, tmp_path, capsys, "--lookahead_steps", str(k)), lookahead_steps=k)


def test_what_the_embedded_model_does_not_have_is_left_out_of_a_rehearsal(tmp_path, capsys):
    """Adapters of other names, an adapter to go on from, kernels of a GPU; and the recipe's own checkpoints stay."""
    options = ["--lora_target_modules", "qkv_proj", "--resume_adapter", "there", "--resume_from_checkpoint", "last"]
    options += ["--attn_implementation", "flash_attention_2", "--output_dir", str(tmp_path / "run")]
    (tmp_path / "run" / "checkpoint-5").mkdir(parents=True)
    train.main(["--config", "gxpo:t4/gxpo.yaml", "--dry-run", *options])
    check_rehearsal("t4/gxpo.yaml", capsys.readouterr().out)
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "checkpoint-5"]


@pytest.mark.parametrize("flag", [["--dry_run=true"], ["--dry-run", "true"], ["--dry_run"], []])
def test_a_rehearsal_leaves_the_runs_folder_alone_however_it_is_asked_for(flag, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("dear")
    path = tmp_path / "r.yaml"
    path.write_text(recipe_path("gxpo:tiny/grpo.yaml").read_text() + ("" if flag else "\ndry_run: true\n"))
    arguments = ["--config", str(path), "--output_dir", str(tmp_path / "mine"), "--eval_strategy", "no", *flag]
    train.main([*arguments, "--eval_on_start", "false"])
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["mine", "notes.txt", "r.yaml"]


def test_a_folder_in_the_way_of_a_rehearsal_is_not_removed(tmp_path):
    (tmp_path / "run-dry-run").mkdir()
    with pytest.raises(SystemExit, match="run-dry-run exists"):
        train.main(["--config", "gxpo:tiny/grpo.yaml", "--dry-run", "--output_dir", f"{tmp_path}/run/"])
    assert (tmp_path / "run-dry-run").is_dir()


def test_what_is_no_rehearsal_is_none(tmp_path):
    """A rehearsal of a recipe for GPUs needs none."""
    path = tmp_path / "r.yaml"
    path.write_text("dry_run: true\noutput_dir: out\n")
    assert parse_recipe(["--config", str(path)]).rehearsal.dry_run
    for words in (["--dry_run", "false"], ["--dry-run=false"]):
        assert not parse_recipe(["--config", str(path), *words, "--use_cpu", "true"]).rehearsal.dry_run
    assert not parse_recipe(["--output_dir", "dry_run", "--use_cpu", "true"]).rehearsal.dry_run


def test_a_mixture_and_the_best_model_are_rehearsed(tmp_path, capsys):
    settings = read("tiny/grpo.yaml") | {"datasets": [{"path": "trl-lib/DeepMath-103K"}]}
    settings |= {"save_strategy": "steps", "save_steps": 5, "load_best_model_at_end": True, "load_in_4bit": True}
    settings |= {"use_peft": True, "reward_model_name_or_path": "somebody/s-reward"}
    del settings["dataset_name"], settings["reward_funcs"]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(settings))
    train.main(["--config", str(tmp_path / "r.yaml"), "--dry-run", "--output_dir", str(tmp_path / "run")])
    assert "Rehearsed" in capsys.readouterr().out


KINDS = list({frozenset(read(name)): name for name in (*NAMES, *IN_SHORT) if not name.startswith(REAL)}.values())
"""One of those that have the same settings, of whatever values."""


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in KINDS if name not in IN_SHORT])
def test_each_kind_can_be_carried_out_in_small(name, tmp_path, capsys):
    check_rehearsal(name, dry_run(name, tmp_path, capsys))


# ---- In the package


def test_a_recipe_of_the_package_is_named_in_any_command(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # not in a clone
    assert parse("tiny/gxpo.yaml").training.lookahead_steps == 5
    assert parse_recipe(["--config=gxpo:tiny/sfpo.yaml"]).training.lookahead_steps == 3
    with pytest.raises(ValueError, match="no recipe `gxpo:tiny/gxpo.yml`; did you mean `tiny/gxpo.yaml`"):
        parse("tiny/gxpo.yml")
    with pytest.raises(ValueError, match="`--config` needs a recipe"):
        parse_recipe(["--config"])


def test_they_are_listed_printed_and_copied(tmp_path, capsys):
    recipes.main([])
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == [f"gxpo:{name}" for name in NAMES]
    recipes.main(["tiny/gxpo.yaml"])
    assert capsys.readouterr().out == recipe_path("gxpo:tiny/gxpo.yaml").read_text()
    recipes.main(["--copy", str(tmp_path / "mine")])
    assert (tmp_path / "mine" / "accelerate" / "zero3.json").is_file()
    with pytest.raises(SystemExit, match="`--copy .*mine` exists already. Name a folder"):  # nothing is overwritten
        recipes.main(["--copy", str(tmp_path / "mine")])
