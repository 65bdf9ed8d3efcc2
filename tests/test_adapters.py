"""Adapters, with a `PeftModel` around the model or without: they train, are described, scored and saved."""

import json

import pytest
import torch
from helpers import attach, make_trainer, parameters, tiny_model
from peft import LoraConfig, PromptTuningConfig, get_peft_model, inject_adapter_in_model
from transformers import TrainerCallback

from gxpo_trl.callbacks.records import describe_run
from gxpo_trl.callbacks.trajectories import TrajectoryCallback


OTHER = {"r": 7, "target_modules": ["q_proj"]}


def lora(r: int = 3, **settings) -> LoraConfig:
    return LoraConfig(**{"r": r, "lora_alpha": 5, "target_modules": ["q_proj", "up_proj"], **settings})


def injected():
    return inject_adapter_in_model(lora(), tiny_model())


def injected_under_a_name():
    return inject_adapter_in_model(lora(), tiny_model(), adapter_name="mine")


def injected_into_a_part():
    model = tiny_model().requires_grad_(False)
    inject_adapter_in_model(lora(), model.model)
    return model


def injected_twice():
    model = inject_adapter_in_model(lora(**OTHER), tiny_model(), adapter_name="first")
    return inject_adapter_in_model(lora(), model, adapter_name="second")


def base_of_a_peft_model():
    return get_peft_model(tiny_model(), lora()).get_base_model()


def added():
    model = tiny_model()
    model.add_adapter(lora(), "mine")
    return model


def added_twice():
    model = tiny_model()
    model.add_adapter(lora(**OTHER), "first")
    model.add_adapter(lora(), "second")
    model.set_adapter("second")
    return model


def peft_model_with_two():
    model = get_peft_model(tiny_model(), lora(**OTHER), "first")
    model.add_adapter("second", lora())
    model.set_adapter("second")
    return model


def peft_model_with_a_frozen_one_in_use():
    model = get_peft_model(tiny_model(), lora(**OTHER), "frozen")
    model.add_adapter("second", lora())
    model.base_model.set_adapter(["frozen", "second"])
    for name, p in model.named_parameters():
        p.requires_grad_(".second." in name)
    return model


def peft_model_with_both_in_use():
    model = get_peft_model(tiny_model(), lora(), "first")
    model.add_adapter("second", lora(**OTHER))
    model.base_model.set_adapter(["first", "second"])
    return model


WITHOUT_A_PEFT_MODEL = (
    *(injected, injected_under_a_name, injected_into_a_part, injected_twice),
    *(base_of_a_peft_model, added, added_twice),
)
PEFT_MODELS = (peft_model_with_two, peft_model_with_a_frozen_one_in_use, peft_model_with_both_in_use)


@pytest.fixture(autouse=True)
def any_peft(monkeypatch):
    """transformers adds adapters with the newest PEFT only; that of the lowest versions does as well here."""
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **kwargs: None)


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmark") / "two.jsonl"
    path.write_text("".join(json.dumps({"problem": f"What is {i} + 1?", "answer": str(i + 1)}) + "\n" for i in (1, 2)))
    return path


NOT_RESUMED = (added, added_twice, peft_model_with_a_frozen_one_in_use, peft_model_with_both_in_use)
"""By no trainer: transformers loads no adapter that it added, and one alone of those of a `PeftModel`."""
IN_SHORT = (injected_into_a_part, added_twice, peft_model_with_both_in_use)


@pytest.mark.parametrize(
    "make_model",
    [
        make if make in IN_SHORT else pytest.param(make, marks=pytest.mark.slow)
        for make in WITHOUT_A_PEFT_MODEL + PEFT_MODELS
    ],
)
def test_an_adapter_trains_and_is_described(tmp_path, benchmark, caplog, make_model):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "eval_steps": 2, "learning_rate": 1e-3}
    trainer = make_trainer(tmp_path, model=make_model(), scripted=False, **settings)
    attach(trainer, eval_benchmarks=[str(benchmark)], eval_samples=1)
    start = parameters(trainer)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card("mine")
    is_saved_as_one = make_model in PEFT_MODELS or make_model in (added, added_twice)
    assert is_saved_as_one == any(tmp_path.rglob("checkpoint-2/**/adapter_model.safetensors"))
    assert is_saved_as_one != any("`from_pretrained` doesn't read them" in message for message in caplog.messages)
    adapter = json.loads((tmp_path / "run.json").read_text())["adapter"]
    assert (adapter["r"], adapter["lora_alpha"], adapter["target_modules"]) == (3, 5, ["q_proj", "up_proj"])
    assert {name: other["r"] for name, other in adapter.get("also_trained", {}).items()} == (
        {"second": 7} if make_model is peft_model_with_both_in_use else {}
    )
    assert "LoRA `target_modules`         | q_proj, up_proj |" in (tmp_path / "README.md").read_text()
    ended = parameters(trainer)
    assert any(not torch.equal(ended[name], p) for name, p in start.items())

    if make_model in NOT_RESUMED:
        return
    resumed = make_trainer(tmp_path, model=make_model(), scripted=False, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert all(torch.equal(p, ended[name]) for name, p in parameters(resumed).items())


@pytest.mark.parametrize("make_model", WITHOUT_A_PEFT_MODEL)
def test_a_trajectory_is_refused_where_no_peft_model_is(tmp_path, make_model):
    with pytest.raises(ValueError, match="layers in it and none around it. Pass `peft_config`"):
        TrajectoryCallback(make_trainer(tmp_path, model=make_model()), 1)


def test_a_trajectory_is_of_one_adapter(tmp_path):
    with pytest.raises(ValueError, match="records one adapter, and first, second are trained together"):
        TrajectoryCallback(make_trainer(tmp_path, model=peft_model_with_both_in_use()), 1)
    make_trainer(tmp_path, model=peft_model_with_two(), max_steps=1, trajectory_steps=1).train()
    config = json.loads((tmp_path / "trajectory" / "step-000001" / "adapter_config.json").read_text())
    assert config["r"] == 3


class AddingAnother(TrainerCallback):
    """A second adapter is trained together with the first, from the second step on."""

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step == 1:
            torch.manual_seed(1)
            model.add_adapter("another", LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
            model.base_model.set_adapter(["default", "another"])
            optimizer.param_groups[0]["params"] += [p for name, p in model.named_parameters() if ".another." in name]


def test_an_adapter_that_is_added_during_a_run_takes_part_in_its_steps(tmp_path):
    """A move by 0, with the optimizer's state rolled back, is no move of any of them."""
    settings = {"max_steps": 3, "learning_rate": 1e-3, "compact_batches": False, "gate_signal": "never"}
    ended = []
    for rule in ({"reposition_alpha": 0.0, "rule": {"rollback": True}}, {"update_rule": "grpo"}):
        torch.manual_seed(0)
        model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        trainer = make_trainer(
            tmp_path, model=model, optimizers=(optimizer, None), callbacks=[AddingAnother()], **settings, **rule
        )
        trainer.train()
        ended.append(parameters(trainer))
    assert any(".another." in name for name in ended[0])
    for name, p in ended[1].items():
        assert torch.allclose(ended[0][name], p, atol=1e-5), name


def test_a_learned_prompt_is_described(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.model = get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    assert describe_run(trainer)["adapter"]["num_virtual_tokens"] == 4
