"""Evaluation of models on benchmarks: samples, verdicts, files, and what can go wrong."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from helpers import tiny_model
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaConfig, MambaForCausalLM

from gxpo_trl.evaluation.benchmark import checksum, judge_samples, read_samples, run_benchmark, slug, write_samples
from gxpo_trl.evaluation.fingerprints import of_model
from gxpo_trl.evaluation.sampling import Sample, load_model, load_tokenizer, read_sample, transformers_sampler
from gxpo_trl.evaluation.scoring import evaluate, verify_again, verify_gold
from gxpo_trl.evaluation.settings import EvaluationArguments
from gxpo_trl.run_folder import BenchmarkResults, Score
from gxpo_trl.scripts.eval import main
from gxpo_trl.scripts.parsing import parse_keys
from gxpo_trl.tasks import TINY_MODEL_PATH, load_problems
from gxpo_trl.tasks.datasets import PROBLEM_SETS, to_prompts
from gxpo_trl.tasks.task import load_task


ROOT = Path(__file__).parents[1]
TINY = "gxpo_trl/tiny"
FEW = {"models": [TINY], "benchmarks": ["arithmetic"], "samples": 4, "max_new_tokens": 28, "limit": 12}
FEW |= {"problems_per_batch": 5, "dtype": "float32"}


def settings(tmp_path: Path, **others) -> EvaluationArguments:
    return EvaluationArguments(**{**FEW, "output_dir": str(tmp_path / "out"), **others})


def samples_file(tmp_path: Path, model: str = TINY) -> Path:
    return tmp_path / "out" / slug(model) / "arithmetic.jsonl"


def without_seconds(path: Path) -> list[dict]:
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in path.read_text().splitlines()]


# ---- A benchmark end to end


def test_a_benchmark_is_sampled_judged_and_written(tmp_path):
    results = evaluate(settings(tmp_path))[TINY]["arithmetic"]
    lines = without_seconds(samples_file(tmp_path))
    benchmark = load_task("arithmetic", limit=12)
    assert [(line["id"], line["sample"]) for line in lines] == [
        (row_id, sample) for row_id in benchmark.problems["id"] for sample in range(4)
    ]
    right = [line["score"] for line in lines]
    assert 0 < sum(right) < len(right)
    for line, gold in zip(lines, [g for g in benchmark.problems["solution"] for _ in range(4)], strict=True):
        assert line["gold"] == gold and line["score"] == float(line["completion"].rstrip().endswith(gold))
        assert line["truncated"] == (line["length"] == 28 and not line["completion"].endswith("}"))
    assert results["metrics"]["avg@4"]["value"] == pytest.approx(sum(right) / len(right))
    assert list(results["metrics"]) == ["avg@4", "pass@1", "maj@1", "pass@2", "maj@2", "pass@4", "maj@4"]
    metric = results["metrics"]["pass@4"]
    assert (results.keys(), metric.keys()) == (BenchmarkResults.__annotations__.keys(), Score.__annotations__.keys())
    assert 0 <= metric["low"] <= metric["value"] <= metric["high"] <= 1 and metric["problems"] == 12
    assert (results["problems"], results["samples"], results["verify_failures"]) == (12, 48, 0)
    written = json.loads((samples_file(tmp_path).parent / "results.json").read_text())
    assert written == {"model": TINY, "benchmarks": {"arithmetic": results}}
    assert "| tiny | arithmetic | 12 |" in (tmp_path / "out" / "table.md").read_text()
    assert not list(tmp_path.rglob("*.part*"))


def test_the_same_seed_draws_the_same_samples_and_another_others(tmp_path):
    runs = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        evaluate(settings(tmp_path / name, seed=seed))
        runs.append(without_seconds(samples_file(tmp_path / name)))
    assert runs[0] == runs[1] != runs[2]


def test_an_interrupted_evaluation_goes_on_where_it_was(tmp_path, monkeypatch):
    evaluate(settings(tmp_path / "whole"))
    calls = []

    def interrupting(model, tokenizer, options):
        sample = transformers_sampler(model, tokenizer, options)

        def interrupted(*batch):
            calls.append(batch)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return sample(*batch)

        return interrupted

    monkeypatch.setattr("gxpo_trl.evaluation.scoring.transformers_sampler", interrupting)
    with pytest.raises(KeyboardInterrupt):
        evaluate(settings(tmp_path / "cut"))
    assert not samples_file(tmp_path / "cut").exists()
    results = evaluate(settings(tmp_path / "cut"))
    assert len(calls) == 2 + 2  # of three batches the first was there
    assert without_seconds(samples_file(tmp_path / "cut")) == without_seconds(samples_file(tmp_path / "whole"))
    assert evaluate(settings(tmp_path / "cut")) == results
    assert len(calls) == 4


@pytest.mark.slow
def test_an_evaluation_that_is_killed_loses_a_batch_at_most(tmp_path):
    """And ends with what one gives that is not. Twice: amid the batches, and later."""
    few = {"samples": 4, "limit": 120, "problems_per_batch": 3}
    evaluate(settings(tmp_path / "whole", **few))
    arguments = [f"--{k}={v}" for k, v in (FEW | few).items() if not isinstance(v, list)]
    arguments += ["--models", TINY, "--benchmarks", "arithmetic", "--output_dir", str(tmp_path / "cut" / "out")]
    command = [sys.executable, "-m", "gxpo_trl.scripts.cli", "eval", *arguments]
    parts, kept = samples_file(tmp_path / "cut").with_suffix(".parts"), {}
    for enough in (3, 20):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while len(list(parts.glob("*.jsonl"))) < enough:
            assert process.poll() is None, "it was over before it was killed"
            time.sleep(0.002)
        process.kill()
        process.wait()
        for path, lines in kept.items():
            assert path.read_text() == lines  # none is made again
        kept = {path: path.read_text() for path in parts.glob("*.jsonl")}
        assert enough <= len(kept) < 40
    (parts / "00039.jsonl").write_text("")  # as where the machine itself goes down
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert without_seconds(samples_file(tmp_path / "cut")) == without_seconds(samples_file(tmp_path / "whole"))
    lines = samples_file(tmp_path / "cut").read_text().splitlines()
    assert {line for text in kept.values() for line in text.splitlines()} <= set(lines)  # with their seconds
    results = [
        json.loads((samples_file(tmp_path / name).parent / "results.json").read_text()) for name in ("cut", "whole")
    ]
    for found in results:
        del found["benchmarks"]["arithmetic"]["seconds"]
    assert results[0] == results[1]
    assert not list(tmp_path.rglob("*.part*"))
    shown = done.stderr.replace("\r", "\n")
    bar = [line for line in shown.splitlines() if line.startswith("arithmetic:")]
    assert "480/480" in bar[-1] and "samples/s" in bar[-1] and f"{4 * 3 * len(kept)}/480" in bar[0]


def test_batches_of_other_problems_are_not_gone_on_with(tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text('{"problem": "1 + 1?", "answer": "2"}\n')
    options = settings(tmp_path, benchmarks=[str(path)], limit=None)
    evaluate(options)
    folder = samples_file(tmp_path).parent
    gathered = next(folder.glob("*one.jsonl"))
    (folder / f"{gathered.stem}.parts").mkdir()
    gathered.rename(folder / f"{gathered.stem}.parts" / "00000.jsonl")
    path.write_text('{"problem": "1 + 1?", "answer": "2", "level": 2}\n')  # which a reward may look at
    with pytest.raises(ValueError, match="samples of other problems"):
        evaluate(options)
    path.write_text('{"problem": "1 + 1?", "answer": "2"}\n')
    assert evaluate(options)[TINY][str(path)]["samples"] == 4


def test_what_a_kill_leaves_beside_gathered_samples_is_removed(tmp_path):
    evaluate(settings(tmp_path))
    parts = samples_file(tmp_path).with_suffix(".parts")
    parts.mkdir()
    (parts / "00000.jsonl").write_text("")
    evaluate(settings(tmp_path))
    assert not parts.exists()


COUNTING = """
import gxpo_trl.evaluation.benchmark as benchmark
from accelerate import PartialState
from gxpo_trl.run_folder import BenchmarkResults, Score
from gxpo_trl.scripts.eval import main

judge, calls = benchmark.judge_samples, []
benchmark.judge_samples = lambda *arguments: (calls.append(1), judge(*arguments))[1]
main()
print(f"rank {PartialState().process_index}: {len(calls)} batches", flush=True)
"""


@pytest.mark.slow
def test_two_processes_share_the_work_and_give_what_one_gives(tmp_path):
    evaluate(settings(tmp_path / "one"))
    arguments = [f"--{k}={v}" for k, v in FEW.items() if not isinstance(v, list)]
    arguments += ["--models", TINY, "--benchmarks", "arithmetic", "--output_dir", str(tmp_path / "two" / "out")]
    (tmp_path / "counting.py").write_text(COUNTING)
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "recipes" / "accelerate" / "ddp.yaml")]
    launch += ["--num_processes", "2", "--main_process_port", "0", str(tmp_path / "counting.py")]
    done = subprocess.run([sys.executable, *launch, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("| tiny | arithmetic | 12 |") == 1
    assert "rank 0: 2 batches" in done.stdout and "rank 1: 1 batches" in done.stdout
    assert without_seconds(samples_file(tmp_path / "two")) == without_seconds(samples_file(tmp_path / "one"))


def test_several_checkpoints_one_of_them_an_adapter(tmp_path):
    base = tmp_path / "base"
    tiny_model().save_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL_PATH)
    tokenizer.save_pretrained(base)
    model = tiny_model()
    model.name_or_path = model.config._name_or_path = str(base)
    adapter = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    adapter.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    models = [str(base), str(tmp_path / "adapter")]
    results = evaluate(settings(tmp_path, models=models))
    assert list(results) == models
    adapted = load_model(models[1], settings(tmp_path), torch.device("cpu"))
    ids = torch.arange(4, 12)[None]
    assert torch.allclose(adapted(input_ids=ids).logits, adapter(input_ids=ids).logits, atol=1e-5)
    assert without_seconds(samples_file(tmp_path, models[0])) != without_seconds(samples_file(tmp_path, models[1]))


def test_a_model_that_grouped_sampling_cannot_serve_is_sampled_by_generate(tmp_path, monkeypatch, caplog):
    PartialState(cpu=True)  # which warnings ask for the rank
    tokenizer = load_tokenizer(str(TINY_MODEL_PATH))
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 8, "state_size": 4, "num_hidden_layers": 1}
    calls = []
    for model in (tiny_model().eval(), MambaForCausalLM(MambaConfig(**sizes)).eval()):
        generate = model.generate
        monkeypatch.setattr(
            model, "generate", lambda *a, f=generate, **k: (calls.append("custom_generate" in k), f(*a, **k))[1]
        )
        sampled = transformers_sampler(model, tokenizer, settings(tmp_path))([[5, 6, 7], [8, 9]], 3, 0)
        assert [len(of_prompt) for of_prompt in sampled] == [3, 3]
        assert all(0 < sample.length <= 28 for of_prompt in sampled for sample in of_prompt)
    assert calls == [True, False]
    assert caplog.text.count("`generate`, which takes longer: MambaForCausalLM takes no KV cache") == 1
    with pytest.raises(ValueError, match="`token_budget` needs grouped generation"):
        transformers_sampler(model, tokenizer, settings(tmp_path, token_budget=100))


OWN_SETTINGS = {"repetition_penalty": 5.0, "min_p": 0.9, "top_k": 1, "top_p": 0.1, "no_repeat_ngram_size": 1}


def test_a_models_own_generation_settings_have_no_part_in_an_evaluation(tmp_path):
    """And they are the model's again afterwards."""
    tokenizer = load_tokenizer(str(TINY_MODEL_PATH))
    sampled = []
    for own in ({}, OWN_SETTINGS):
        model = tiny_model().eval()
        model.generation_config.update(**own)
        before = model.generation_config.to_dict()
        sampled.append(transformers_sampler(model, tokenizer, settings(tmp_path))([[5, 6, 7], [8, 9]], 4, 0))
        assert model.generation_config.to_dict() == before
    assert sampled[0] == sampled[1] and len({sample.text for sample in sampled[0][0]}) > 1


@pytest.mark.parametrize("name, value", [("repetition_penalty", 5.0), ("min_p", 0.9), ("top_k", 1), ("top_p", 0.1)])
def test_the_settings_of_the_distribution_are_those_that_are_sampled_from(tmp_path, name, value):
    tokenizer, model = load_tokenizer(str(TINY_MODEL_PATH)), tiny_model().eval()
    plain, changed = (
        transformers_sampler(model, tokenizer, settings(tmp_path, **more))([[5, 6, 7]], 8, 0)
        for more in ({}, {name: value})
    )
    assert plain != changed


@pytest.mark.parametrize("name", ["gxpo", "sfpo", "next"])
def test_the_papers_recipes_name_benchmarks_and_ask_for_a_box(name):
    (recipe,) = parse_keys(["--config", str(ROOT / "recipes" / "eval" / f"{name}.yaml")], (EvaluationArguments,))
    assert set(recipe.benchmarks) <= PROBLEM_SETS.keys()
    problems = to_prompts(load_problems("arithmetic", limit=1), recipe.prompt)
    assert problems[0]["prompt"][0]["content"].endswith("put your final answer within \\boxed{}.")


@pytest.mark.parametrize(
    "ids, length, truncated", [([5, 6, 1, 0, 0], 3, False), ([5, 6, 7], 3, True), ([1, 0], 1, False)]
)
def test_a_sample_ends_with_the_token_that_ends_it(ids, length, truncated):
    sample = read_sample(ids, AutoTokenizer.from_pretrained(TINY_MODEL_PATH), ends={1})
    assert (sample.length, sample.truncated) == (length, truncated)


# ---- Judging again, and the right answers against themselves


def test_recorded_completions_are_judged_again(tmp_path, capsys):
    results = evaluate(settings(tmp_path))[TINY]["arithmetic"]
    path = samples_file(tmp_path)
    again, changed = verify_again(path, ks=[1, 2, 4])
    assert changed == 0 and again["metrics"] == results["metrics"]
    lines = path.read_text().splitlines()
    spoiled = json.loads(lines[0])
    path.write_text("\n".join([json.dumps({**spoiled, "score": 1.0 - spoiled["score"]}), *lines[1:]]) + "\n")
    main(["--verify-only", str(path), "--samples", "4"])
    assert "1 of 48 scores differ from the recorded ones" in capsys.readouterr().out
    assert read_samples(path.with_suffix(".verified.jsonl"))[0].score == spoiled["score"]


def sampled(folder: Path, kind: str = "maths", **row) -> Path:
    """Samples of one problem, the row of `folder/data.jsonl`, without a model."""
    folder.mkdir(exist_ok=True)
    (folder / "data.jsonl").write_text(json.dumps({"problem": "1 + 1?", "answer": "B", "want": "B"} | row) + "\n")
    task, path = load_task(str(folder / "data.jsonl"), kind=kind), folder / f"{slug(str(folder / 'data'))}.jsonl"
    texts = ("It is (B).", "\\boxed{B}", "C")
    write_samples(path, judge_samples(task, [0], [[Sample(text, [1], truncated=False) for text in texts]]))
    return path


REWARD = """
def score(completions, want, **kwargs):
    return [0.5 if wanted in completion[-1]["content"] else 0.0 for completion, wanted in zip(completions, want)]
"""


def test_recorded_completions_are_judged_as_they_are_told(tmp_path, capsys, monkeypatch):
    path = sampled(tmp_path / "set")
    (tmp_path / "rr.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    words = ["--verify_only", str(path), "--samples", "3"]
    data = ["--benchmarks", "set/data.jsonl"]

    def scores(*more: str) -> list[float]:
        main([*words, *more])
        capsys.readouterr()
        return [record.score for record in read_samples(path.with_suffix(".verified.jsonl"))]

    assert scores() == scores(*data) == [0.0, 1.0, 0.0]
    assert scores("--kind", "choice") == scores(*data, "--kind", "choice") == [1.0, 1.0, 0.0]
    rewarded = [*data, "--reward_funcs", "rr.py:score"]
    assert scores(*rewarded) == [0.0, 0.0, 0.0] and scores(*rewarded, "--threshold", "0.5") == [1.0, 1.0, 0.0]
    assert {record.kind for record in read_samples(path.with_suffix(".verified.jsonl"))} == {"reward"}


@pytest.mark.parametrize(
    "more, message",
    [
        (["--reward_funcs", "rr.py:score"], "`reward_funcs` does nothing with `verify_only` and no data"),
        (["--threshold", "0.5"], "`threshold` does nothing without `reward_funcs`"),
        (["--answer_column", "want"], "`answer_column` does nothing with `verify_only` and no data"),
        (["--kind", "chioce"], "no kind of answer `chioce`"),
        (["--benchmarks", "arithmetic"], r"None of `benchmarks` has its samples in set--data.jsonl: arithmetic \("),
        (["--benchmarks", "set/data.jsonl", "--prompt", "Q: {problem}"], "holds samples of other problems"),
        (["--gold"], "`gold` and `verify_only`"),
    ],
    ids=str,
)
def test_what_judging_again_cannot_use_is_refused(tmp_path, monkeypatch, more, message):
    path = sampled(tmp_path / "set")
    (tmp_path / "rr.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        main(["--verify_only", str(path), "--samples", "3", *more])
    assert not path.with_suffix(".verified.jsonl").exists()


@pytest.mark.parametrize("edit", [{"answer": "C"}, {"want": "C"}, {"problem": "1 + 2?"}], ids=str)
def test_rows_that_were_edited_since_are_not_judged_with(tmp_path, monkeypatch, edit):
    monkeypatch.chdir(tmp_path)
    path = sampled(tmp_path / "set")
    before = path.read_text()
    sampled(tmp_path / "set", **edit)
    path.write_text(before)
    with pytest.raises(SystemExit, match="samples of other problems than set/data.jsonl: its rows, or `prompt`"):
        main(["--verify_only", str(path), "--samples", "3", "--benchmarks", "set/data.jsonl"])


def test_samples_of_a_model_without_a_chat_template_and_of_earlier_versions_are_judged_again(tmp_path):
    path = sampled(tmp_path / "set")
    task = load_task(str(tmp_path / "set" / "data.jsonl"), kind="choice")
    text = {**task.problems[0], "prompt": task.problems[0]["prompt"][0]["content"]}
    for asked in (checksum(text), ""):
        write_samples(path, [replace(record, asked=asked) for record in read_samples(path)])
        assert verify_again(path, [1], [task])[1] == 1


def test_right_answers_are_accepted_and_refused_ones_named(tmp_path, capsys):
    assert verify_gold(load_task("arithmetic")) == []
    path = tmp_path / "odd.jsonl"
    rows = [{"q": "1 + 1?", "a": "2"}, {"q": "Name?", "a": "\\boxed{seven}"}]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    columns = ["--problem_column", "q", "--answer_column", "a", "--kind", "arithmetic"]
    main(["--gold", "--benchmarks", str(path), *columns])
    out = capsys.readouterr().out
    assert "1 of 2 right answers are not accepted" in out or "2 of 2 right answers are not accepted" in out
    assert "seven" in out


# ---- Bad input


@pytest.mark.parametrize(
    "change, message",
    [
        ({"models": []}, "`models`"),
        ({"benchmarks": []}, "`benchmarks`"),
        ({"benchmarks": ["MATH-50"]}, "MATH-500"),
        ({"samples": 0}, "`samples`"),
        ({"ks": [1, 8]}, "`ks` has 8, and there are 4"),
        ({"temperature": 0.0}, "`samples: 1`"),
        ({"temperature": -1.0}, "`temperature`"),
        ({"top_p": 0.0}, "`top_p`"),
        ({"backend": "onnx"}, "`backend`"),
        ({"prompt": "Solve this."}, "{problem}"),
        ({"backend": "vllm"}, "needs vLLM"),
        ({"backend": "vllm", "min_p": 0.1, "top_p": 0.9}, "`min_p` before `top_p`"),
        ({"min_p": 1.5}, "`min_p` must be between 0 and 1"),
        ({"top_k": -1}, "`top_k` must be at least 0"),
        ({"repetition_penalty": 0.0}, "`repetition_penalty` must be a finite number above 0"),
        ({"vllm_gpu_memory_utilization": 0.0}, "`vllm_gpu_memory_utilization` must be above 0"),
        ({"threshold": 0.5}, "`threshold` does nothing without `reward_funcs`"),
        ({"reward_weights": [1.0]}, "`reward_weights` does nothing without `reward_funcs`"),
        ({"backend": "vllm", "token_budget": 100}, "`token_budget` has no meaning"),
    ],
    ids=str,
)
def test_bad_settings_are_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message.replace("{", r"\{")):
        evaluate(settings(tmp_path, **change))
    assert not list(tmp_path.rglob("*.jsonl"))


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    AutoTokenizer.from_pretrained(TINY_MODEL_PATH).save_pretrained(tmp_path / "empty")
    with pytest.raises(ValueError, match="is not a checkpoint"):
        evaluate(settings(tmp_path, models=[str(tmp_path / "empty")]))


def test_results_of_other_settings_are_not_mixed_in(tmp_path):
    evaluate(settings(tmp_path))
    with pytest.raises(ValueError, match="holds an evaluation with `samples: 4`.*another `output_dir`"):
        evaluate(settings(tmp_path, samples=2))
    evaluate(settings(tmp_path, ks=[3]))  # which draws nothing else


def model_at(folder: Path, seed: int = 0) -> str:
    """The embedded model, with other weights for another seed."""
    model = tiny_model()
    if seed:
        with torch.no_grad():
            model.lm_head.weight[seed] += 1.0
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY_MODEL_PATH).save_pretrained(folder)
    return str(folder)


def adapter_at(folder: Path, base: str, seed: int = 0) -> str:
    torch.manual_seed(seed)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(init_lora_weights=False)).save_pretrained(
        folder
    )
    return str(folder)


def test_samples_of_a_model_that_has_changed_are_not_used_again(tmp_path):
    chosen = settings(tmp_path, models=[model_at(tmp_path / "run")], limit=2, problems_per_batch=2)
    evaluate(chosen)
    table = (tmp_path / "out" / "table.md").read_text()
    model_at(tmp_path / "run")  # the same weights, written again
    (tmp_path / "run" / "training_args.bin").write_text("other settings")
    evaluate(chosen)
    model_at(tmp_path / "run", seed=1)
    with pytest.raises(ValueError, match="run has changed since it was evaluated in .*Use another `output_dir`"):
        evaluate(chosen)
    assert (tmp_path / "out" / "table.md").read_text() == table


def test_an_adapter_changes_with_its_base(tmp_path):
    base = model_at(tmp_path / "base")
    chosen = settings(tmp_path, models=[adapter_at(tmp_path / "run", base)], limit=2, problems_per_batch=2)
    evaluate(chosen)
    evaluate(chosen)
    model_at(tmp_path / "base", seed=1)
    with pytest.raises(ValueError, match="run has changed since"):
        evaluate(chosen)
    model_at(tmp_path / "base")
    adapter_at(tmp_path / "run", base, seed=1)
    with pytest.raises(ValueError, match="run has changed since"):
        evaluate(chosen)


def test_a_name_of_the_hub_is_known_by_its_revision(tmp_path, monkeypatch):
    cached = str(tmp_path / "models--a--b" / "snapshots" / "abc123" / "config.json")
    monkeypatch.setattr("gxpo_trl.evaluation.fingerprints.try_to_load_from_cache", lambda name, file: cached)
    assert of_model("a/b") == "abc123"
    adapter = adapter_at(tmp_path / "run", str(TINY_MODEL_PATH))
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    (tmp_path / "run" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "a/b"}))
    with_base = of_model(adapter)
    monkeypatch.undo()
    assert of_model(adapter) == with_base  # which is loaded after the checksum was computed
    assert of_model("nobody/has-this") is None and of_model("/no/such/folder") is None


@pytest.mark.parametrize("named", ["scores.py:score", "scores.score"])
def test_samples_of_rewards_that_have_changed_are_not_used_again(tmp_path, monkeypatch, named):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "scores", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    source = "def score(completions, **kwargs):\n    return [1.0] * len(completions)\n"
    (tmp_path / "scores.py").write_text(source)
    chosen = settings(tmp_path, limit=2, problems_per_batch=2, reward_funcs=[named, "boxed_format_reward"])
    evaluate(chosen)
    (tmp_path / "scores.py").write_text(source.replace("1.0", "0.0"))
    with pytest.raises(ValueError, match="file of `reward_funcs: scores.* has changed since .*`verify_only`"):
        evaluate(chosen)
    (tmp_path / "scores.py").write_text(source)
    evaluate(chosen)


def test_samples_of_an_earlier_version_are_used_with_a_warning(tmp_path, caplog):
    chosen = settings(tmp_path, models=[model_at(tmp_path / "run")], limit=2, problems_per_batch=2)
    results = evaluate(chosen)
    path = next((tmp_path / "out").glob("*/settings.json"))
    written = {k: v for k, v in json.loads(path.read_text()).items() if k != "content"}
    path.write_text(json.dumps(written))
    model_at(tmp_path / "run", seed=1)
    for _ in range(2):  # nothing is recorded that is not known
        caplog.clear()
        assert evaluate(chosen) == results
        assert "by an earlier version, which has not recorded" in caplog.text
    assert json.loads(path.read_text()) == written


@pytest.mark.parametrize("name, remedy", [("settings.json", "Use another"), ("results.json", "Remove the file")])
@pytest.mark.parametrize("text", ['{"model": ', "[]"])
def test_a_damaged_file_of_an_evaluation_is_named(tmp_path, name, remedy, text):
    chosen = settings(tmp_path, limit=2, problems_per_batch=2)
    evaluate(chosen)
    path = samples_file(tmp_path).parent / name
    before = path.read_text()
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{path}.*{remedy}"):
        evaluate(chosen)
    assert path.read_text() == text
    path.write_text(before)
    evaluate(chosen)


def test_the_table_has_the_models_of_earlier_calls(tmp_path, caplog):
    runs = [model_at(tmp_path / part / "run", seed) for seed, part in enumerate(("a", "b"))]
    for run in (*runs, runs[0]):
        evaluate(settings(tmp_path, models=[run], limit=2, problems_per_batch=2))
    rows = (tmp_path / "out" / "table.md").read_text().splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| b--run", "| a--run"]  # those of this call last
    (tmp_path / "out" / "b--run" / "results.json").write_text("{")
    evaluate(settings(tmp_path, models=[runs[0]], limit=2, problems_per_batch=2))
    assert "without the model of a damaged file" in caplog.text
    assert "| run |" in (tmp_path / "out" / "table.md").read_text()


def test_models_do_not_share_a_folder(tmp_path):
    same = [str(tmp_path / run / "a" / "checkpoint-1") for run in ("x", "y")]
    for folder in same:
        tiny_model().save_pretrained(folder)
        AutoTokenizer.from_pretrained(TINY_MODEL_PATH).save_pretrained(folder)
    with pytest.raises(ValueError, match="would share the folder"):
        evaluate(settings(tmp_path, models=same))
    evaluate(settings(tmp_path, models=same[:1]))
    with pytest.raises(ValueError, match="holds an evaluation with `model: .*x/a/checkpoint-1`"):
        evaluate(settings(tmp_path, models=same[1:]))


def test_results_of_other_benchmarks_stay_and_samples_of_other_problems_are_refused(tmp_path):
    path = tmp_path / "x" / "two.jsonl"
    path.parent.mkdir()
    path.write_text('{"problem": "1 + 1?", "answer": "2"}\n{"problem": "1 + 2?", "answer": "3"}\n')
    evaluate(settings(tmp_path))
    evaluate(settings(tmp_path, benchmarks=[str(path)]))
    written = json.loads((samples_file(tmp_path).parent / "results.json").read_text())
    assert list(written["benchmarks"]) == ["arithmetic", str(path)]
    path.write_text('{"problem": "1 + 1?", "answer": "2"}\n{"problem": "1 + 3?", "answer": "4"}\n')
    with pytest.raises(ValueError, match="samples of other problems"):
        evaluate(settings(tmp_path, benchmarks=[str(path)]))
    with pytest.raises(ValueError, match="would share a file"):
        evaluate(settings(tmp_path, benchmarks=[str(path), str(path)]))


@pytest.mark.parametrize(
    "name, folder",
    [
        ("MATH-500", "MATH-500"),
        ("Qwen/Qwen2.5-1.5B", "Qwen--Qwen2.5-1.5B"),
        ("/data/run/checkpoint-10/", "run--checkpoint-10"),
        ("../data/math.jsonl", "data--math"),
    ],
)
def test_names_become_folders(name, folder):
    assert slug(name) == folder


def test_the_working_directory_has_a_name_too(tmp_path, monkeypatch):
    (tmp_path / "run" / "checkpoint-10").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "run" / "checkpoint-10")
    assert slug(".") == "run--checkpoint-10" and slug("..").endswith("--run")


def test_images_are_told_apart_by_their_content():
    """Their texts have addresses, which are others each time."""
    rows = [
        {"problem": "1 + 1", "figure": Image.new("RGB", (4, 4), color), "made": object()} for color in ("red", "blue")
    ]
    again = [{**row, "figure": row["figure"].copy(), "made": object()} for row in rows]
    assert [checksum(row) for row in rows] == [checksum(row) for row in again]
    assert checksum(rows[0]) != checksum(rows[1])


def test_further_arguments_reach_the_chat_template(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL_PATH)
    tokenizer.chat_template = "{{ messages[0].content }}{% if twice %}{{ messages[0].content }}{% endif %}"
    task, arguments = load_task("arithmetic", limit=2), '{"twice": true}'
    seen = []
    for more in ({}, {"chat_template_kwargs": arguments}):

        def sampler(prompts, n, seed):
            seen.append(prompts)
            return [[Sample("", [1], truncated=False)] * n for _ in prompts]

        chosen = settings(tmp_path, samples=1, ks=[1], **more)
        run_benchmark(task, sampler, tokenizer, tmp_path / str(len(more)), chosen)
    assert seen[1] == [ids + ids for ids in seen[0]]
    with pytest.raises(ValueError, match="`chat_template_kwargs` must be a mapping"):
        settings(tmp_path, chat_template_kwargs="[1]")


def test_a_file_that_holds_no_samples_is_named(tmp_path):
    path = tmp_path / "x.jsonl"
    with pytest.raises(ValueError, match="no samples file"):
        verify_again(path, ks=[1])
    path.write_text('{"a": 1}\n')
    with pytest.raises(ValueError, match="not a samples file of `gxpo eval`"):
        verify_again(path, ks=[1])


def test_the_command_says_in_one_line_what_is_wrong(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--models", TINY, "--benchmark", "arithmetic"])
    assert str(stopped.value).startswith("error: Unknown key `benchmark`")
