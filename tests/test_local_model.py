"""A model in a local folder, in every command that takes one."""

import json
from pathlib import Path

import pytest
from helpers import tiny_model
from transformers import AutoTokenizer

from gxpo_trl.scripts import cli
from gxpo_trl.scripts.push import gather
from gxpo_trl.tasks import TINY_MODEL_PATH


RECIPE = Path(__file__).parents[1] / "recipes" / "tiny" / "grpo.yaml"
SMALL = ["--config", str(RECIPE), "--max_steps", "4", "--eval_strategy", "no", "--eval_on_start", "false"]
SMALL += ["--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "2", "--num_generations", "4"]
LORA = ["--use_peft", "--lora_r", "4", "--lora_target_modules", "all-linear", "--trajectory_steps", "1"]
EVAL = ["--benchmarks", "arithmetic", "--samples", "1", "--limit", "4", "--max_new_tokens", "12", "--ks", "1"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["models/base", "./models/base/", "absolute"])
def test_it_is_trained_evaluated_extrapolated_merged_and_gathered(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("models/base")
    AutoTokenizer.from_pretrained(TINY_MODEL_PATH).save_pretrained("models/base")
    name = str(tmp_path / "models" / "base") if name == "absolute" else name
    cli.main(["train", *SMALL, *LORA, "--model_name_or_path", name, "--output_dir", "out/run", "--dry-run"])
    assert not Path("out").exists() or not any(Path("out").iterdir())
    cli.main(["train", *SMALL, *LORA, "--model_name_or_path", name, "--output_dir", "out/run"])
    cli.main(["extrapolate", "out/run", "--method", "rl-extra", "--steps-ahead", "1"])
    ahead = next(Path("out/run/extrapolated/rl-extra").glob("alpha-*"))
    cli.main(["merge", "out/run", "--output_dir", "out/merged"])
    cli.main(["merge", str(ahead), "--output_dir", "out/ahead"])
    models = [name, "out/run", "out/merged", "out/ahead", str(ahead)]
    cli.main(["eval", "--models", *models, *EVAL, "--output_dir", "out/eval"])
    scores = [json.loads(path.read_text())["model"] for path in Path("out/eval").glob("*/results.json")]
    assert sorted(scores) == sorted(models)
    for run, has_adapter in (("out/run", True), ("out/merged", False), (str(ahead), True)):
        folder = tmp_path / "sent" / Path(run).name
        gather(Path(run), folder, merge=has_adapter, evaluation=None)
        assert (folder / "model.safetensors").is_file() and not (folder / "adapter_config.json").exists()
        if (folder / "README.md").is_file():  # where the Hub would refuse a path
            head = (folder / "README.md").read_text().split("---")[1]
            assert "models/base" not in head
    cli.main(["train", *SMALL, "--model_name_or_path", "out/merged", "--output_dir", "out/again", "--max_steps", "1"])
    assert Path("out/again/model.safetensors").is_file()
