"""Which checkpoints are whole: those of this package, of TRL, of engines; and what is said of the others."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as distributed
from helpers import logged, make_trainer, train
from peft import LoraConfig
from safetensors.torch import save_file
from trl import GRPOConfig, GRPOTrainer

from gxpo_trl.trainer.checkpoints import find_fault, holds_model, newest_whole, read_state
from gxpo_trl.update.gate import Gate, Trigger


SAVING = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("full")
    train(folder, **SAVING)
    return folder


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    train(folder, peft_config=LoraConfig(r=4, target_modules="all-linear"), **SAVING)
    return folder


@pytest.fixture
def run(full, tmp_path) -> Path:
    return Path(shutil.copytree(full, tmp_path / "run"))


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without_end(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def zeros(path: Path) -> None:
    """A file whose length has reached the disk, and whose content has not."""
    path.write_bytes(bytes(path.stat().st_size))


FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
FILES += ("lookahead_state.json",)


@pytest.mark.parametrize("damage", [Path.unlink, half, without_end, empty, zeros])
@pytest.mark.parametrize("name", FILES)
def test_each_file_that_is_damaged_is_found(run, name, damage):
    if damage is without_end and name.endswith("state.json"):
        damage = half  # the last character of a JSON file may be a newline
    damage(run / "checkpoint-4" / name)
    fault = find_fault(run / "checkpoint-4")
    parts = {"model.safetensors": "weights", "rng_state.pth": "random numbers"}
    assert name in fault or (damage is Path.unlink and (parts.get(name) or name.partition(".")[0]) in fault)
    assert newest_whole(run) == (run / "checkpoint-2", {run / "checkpoint-4": fault})


def test_an_adapters_checkpoint_is_whole_and_its_weights_are_looked_at(lora, tmp_path):
    assert newest_whole(lora) == (lora / "checkpoint-4", {})
    for damage in (Path.unlink, half, empty):
        checkpoint = Path(shutil.copytree(lora / "checkpoint-4", tmp_path / damage.__name__ / "checkpoint-4"))
        damage(checkpoint / "adapter_model.safetensors")
        assert find_fault(checkpoint) is not None and not holds_model(checkpoint)


def test_where_there_is_no_checkpoint_there_is_none_and_where_none_is_whole_that_is_said(run, tmp_path):
    assert newest_whole(tmp_path) == newest_whole(tmp_path / "nothing") == (None, {})
    for step in (2, 4):
        (run / f"checkpoint-{step}" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match="No checkpoint in .*checkpoint-4: the state of the optimizer.*Delete them"):
        newest_whole(run)


def test_names_that_are_like_checkpoints_are_none(run):
    for name in ("partial-checkpoint-6", "checkpoint-8.partial", "checkpoint-x", "step-10"):
        shutil.copytree(run / "checkpoint-4", run / name)
    (run / "checkpoint-9").write_text("a file")
    assert newest_whole(run) == (run / "checkpoint-4", {})


@pytest.mark.parametrize("state", ["{}", "[]", "3", '{"global_step": "4"}', '{"global_step": -1}', "[" * 100_000])
def test_a_state_of_the_trainer_that_says_nothing(run, state):
    (run / "checkpoint-4" / "trainer_state.json").write_text(state)
    assert "trainer_state.json" in find_fault(run / "checkpoint-4")


def test_a_checkpoint_of_trl_is_whole_without_a_gate(tmp_path):
    train(tmp_path, GRPOTrainer, GRPOConfig, **SAVING)
    assert newest_whole(tmp_path) == (tmp_path / "checkpoint-4", {})


# ---- The gate


GATE = {"values": [1.0, 2], "observed": 2, "exceedances": 0, "active_steps": 2, "decaying": 0, "active": True}


@pytest.mark.parametrize(
    "change, part",
    [
        ({"resting": -1}, "resting"),
        ({"resting": "soon"}, "resting"),
        ({"resting": 1.5}, "resting"),
        ({"resting": True}, "resting"),
        ({"resting": None}, "resting"),
        ({"resting": 7}, "gate_fallback"),
        ({"values": None}, "values"),
        ({"values": "12"}, "values"),
        ({"values": [1.0, "2"]}, "values"),
        ({"values": [float("nan")]}, "values"),
        ({"values": [float("inf")]}, "values"),
        ({"values": {"0": 1.0}}, "values"),
        ({"observed": -1}, "observed"),
        ({"exceedances": 0.5}, "exceedances"),
        ({"active_steps": "3"}, "active_steps"),
        ({"decaying": [0]}, "decaying"),
        ({"decaying": True}, "decaying"),
        ({"active": 1}, "active"),
        ({"active": "false"}, "active"),
    ],
    ids=str,
)
def test_a_gate_of_nonsense_is_refused_and_the_file_is_named(tmp_path, change, part):
    gate = Gate(Trigger(0.5))
    with pytest.raises(ValueError, match=part):
        gate.load_state_dict(GATE | change)
    assert gate == Gate(Trigger(0.5))
    state = {"gate": GATE | change, "backward_passes": 6, "fallbacks": 0, "shutoff_step": None}
    (tmp_path / "lookahead_state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=f"lookahead_state.json.*{part}"):
        read_state(tmp_path)


@pytest.mark.parametrize("name", GATE)
def test_a_gate_that_lacks_a_part_is_refused(name):
    with pytest.raises(ValueError, match=f"no `{name}`"):
        Gate(Trigger(0.5)).load_state_dict({k: v for k, v in GATE.items() if k != name})


@pytest.mark.parametrize(
    "change",
    [
        *({"backward_passes": value} for value in (-1, "3", None, -0.5, True, [])),
        *({"shutoff_step": value} for value in (-3, "4", False)),
        {"fallbacks": None},
        {"gate": None},
        {"gate": []},
        {"checkpoint": 5},
        {"checkpoint": {"processes": "two"}},
    ],
    ids=str,
)
def test_counts_of_nonsense_make_a_checkpoint_one_that_is_not_whole(run, change):
    path = run / "checkpoint-4" / "lookahead_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    fault = find_fault(path.parent)
    assert "lookahead_state.json" in fault and next(iter(change)) in fault


@pytest.mark.parametrize("state", ["", "{", "[]", "null", '"x"', "{}", '{"gate": {}}'])
def test_a_file_that_holds_no_state_is_found(run, state):
    (run / "checkpoint-4" / "lookahead_state.json").write_text(state)
    assert "lookahead_state.json" in find_fault(run / "checkpoint-4")
    assert newest_whole(run)[0] == run / "checkpoint-2"


# ---- What engines write


def test_a_model_in_shards_needs_all_of_them(run):
    checkpoint = run / "checkpoint-4"
    for i in (1, 2):
        shutil.copy(checkpoint / "model.safetensors", checkpoint / f"model-0000{i}-of-00002.safetensors")
    (checkpoint / "model.safetensors").unlink()
    assert "weights" in find_fault(checkpoint)  # which no index names
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    assert find_fault(checkpoint) is None
    half(checkpoint / "model-00002-of-00002.safetensors")
    assert "model-00002-of-00002.safetensors is damaged" in find_fault(checkpoint)
    (checkpoint / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors is missing" in find_fault(checkpoint)
    (checkpoint / "model.safetensors.index.json").write_text("{}")
    assert "index.json is damaged" in find_fault(checkpoint)


def of_two(checkpoint: Path) -> None:
    """As if two processes had saved it."""
    path = checkpoint / "lookahead_state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps(state | {"checkpoint": state["checkpoint"] | {"processes": 2}}))
    shutil.copy(checkpoint / "rng_state.pth", checkpoint / "rng_state_1.pth")
    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")


def test_each_process_has_saved_its_random_numbers(run):
    checkpoint = run / "checkpoint-4"
    of_two(checkpoint)
    assert find_fault(checkpoint) is None
    (checkpoint / "rng_state_1.pth").unlink()
    assert "rng_state_1.pth is missing" in find_fault(checkpoint)


def test_deepspeed_names_its_folder_and_each_process_has_its_share(run):
    checkpoint = run / "checkpoint-4"
    of_two(checkpoint)
    (checkpoint / "optimizer.pt").unlink()
    (checkpoint / "latest").write_text("global_step4")
    (checkpoint / "global_step4").mkdir()
    states = ["mp_rank_00_model_states.pt", *(f"zero_pp_rank_{i}_mp_rank_00_optim_states.pt" for i in (0, 1))]
    for name in states:
        torch.save({"x": torch.ones(4)}, checkpoint / "global_step4" / name)
    assert find_fault(checkpoint) is None
    for name in states:
        path = checkpoint / "global_step4" / name
        content = path.read_bytes()
        path.unlink()
        assert "DeepSpeed" in find_fault(checkpoint)
        path.write_bytes(content[:-5])
        assert name in find_fault(checkpoint)
        path.write_bytes(content)
    for tag in ("", "global_step2"):
        (checkpoint / "latest").write_text(tag)
        assert "`latest`" in find_fault(checkpoint)


def test_shards_of_fsdp_are_as_long_as_their_metadata_say(run):
    checkpoint = run / "checkpoint-4"
    for name, replaced in (("pytorch_model_fsdp_0", "model.safetensors"), ("optimizer_0", "optimizer.pt")):
        (checkpoint / replaced).unlink()
        distributed.save({"x": torch.randn(64)}, checkpoint_id=checkpoint / name, no_dist=True)
    assert find_fault(checkpoint) is None
    shard = next((checkpoint / "optimizer_0").glob("*.distcp"))
    half(shard)
    assert "optimizer_0/.metadata is damaged" in find_fault(checkpoint)  # or what it speaks of
    (checkpoint / "optimizer_0" / ".metadata").unlink()
    assert "optimizer_0/.metadata is missing" in find_fault(checkpoint)


# ---- Going on, in a script of one's own


def test_true_is_the_newest_that_is_whole_and_the_other_is_set_aside(run, caplog):
    straight = train(run, **SAVING | {"save_steps": 4})
    half(run / "checkpoint-4" / "optimizer.pt")
    resumed = train(run, resume_from_checkpoint=True, **SAVING)
    assert "checkpoint-4 is not whole: optimizer.pt is damaged" in caplog.text
    assert (run / "partial-checkpoint-4").is_dir() and newest_whole(run) == (run / "checkpoint-4", {})
    assert all(map(torch.equal, straight.model.parameters(), resumed.model.parameters()))


def test_last_is_a_word_for_the_newest_one_in_a_script_too(run):
    trainer = make_trainer(run, **SAVING)
    trainer.train(resume_from_checkpoint="last")
    assert trainer.state.global_step == trainer.args.max_steps


def test_true_without_a_checkpoint_and_a_name_without_one_are_refused(run, tmp_path):
    trainer = make_trainer(tmp_path / "other", **SAVING)
    with pytest.raises(ValueError, match="There is no checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(
        ValueError, match="is the folder of a run. Name one of its checkpoints, such as .*checkpoint-4"
    ):
        trainer.train(resume_from_checkpoint=str(run))
    with pytest.raises(ValueError, match="is not a folder"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "nothing"))
    empty(run / "checkpoint-4" / "rng_state.pth")
    with pytest.raises(ValueError, match="not a whole checkpoint: rng_state.pth"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-4"))


@pytest.mark.parametrize("steps", [4, 3, 1])
def test_a_run_that_has_come_to_its_end_takes_no_further_step(run, steps):
    """Trainer itself takes one where the end lies within an epoch."""
    resumed = train(run, resume_from_checkpoint=str(run / "checkpoint-4"), **SAVING | {"max_steps": steps})
    assert resumed.state.global_step == 4 and len(logged(resumed, "loss")) == 4
    saved = type(resumed.model).from_pretrained(run / "checkpoint-4")
    assert all(map(torch.equal, saved.parameters(), resumed.model.parameters()))


def test_a_run_of_epochs_ends_with_them(tmp_path):
    settings = {"max_steps": -1, "num_train_epochs": 0.2, "save_strategy": "steps", "save_steps": 1}
    steps = train(tmp_path, **settings).state.global_step
    again = train(tmp_path, resume_from_checkpoint=True, **settings)
    assert again.state.global_step == steps == len(logged(again, "loss"))


def test_what_lies_where_a_checkpoint_is_saved_is_not_mixed_with_it(run):
    """A kill would leave new weights beside an old optimizer, each of them whole."""
    (run / "checkpoint-4" / "of_before.json").write_text("{}")
    train(run, resume_from_checkpoint=str(run / "checkpoint-2"), **SAVING)
    assert not (run / "checkpoint-4" / "of_before.json").exists() and find_fault(run / "checkpoint-4") is None


def test_older_checkpoints_go_and_one_that_is_not_whole_takes_no_place(run):
    half(run / "checkpoint-4" / "model.safetensors")
    settings = SAVING | {"max_steps": 7, "save_steps": 1, "save_total_limit": 2}
    trainer = train(run, resume_from_checkpoint=True, **settings)
    assert trainer.args.save_total_limit == 2
    saved = torch.load(run / "checkpoint-7" / "training_args.bin", weights_only=False)
    assert saved.save_total_limit == 2
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-7"]
    assert all(find_fault(path) is None for path in run.glob("checkpoint-*"))


class Stopped(Exception):
    pass


def test_the_last_whole_one_goes_when_the_next_is_whole_and_not_before(run, monkeypatch):
    trainer = make_trainer(run, **SAVING | {"max_steps": 6, "save_total_limit": 1})

    def stop(self, path):
        raise Stopped

    monkeypatch.setattr("transformers.trainer.TrainerState.save_to_json", stop)
    with pytest.raises(Stopped):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-4"))
    assert newest_whole(run)[0] == run / "checkpoint-4" and (run / "checkpoint-6").is_dir()


# ---- Models alone


def test_a_fired_gate_stays_shut_where_only_the_model_is_saved(tmp_path, caplog):
    settings = SAVING | {"save_only_model": True, "max_active_steps": 1}
    straight = train(tmp_path, **settings)
    assert straight.lookahead.shutoff_step == 1 and find_fault(tmp_path / "checkpoint-2") is None
    caplog.clear()
    resumed = train(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-2"), **settings)
    assert resumed.lookahead.shutoff_step == 1 and not resumed.lookahead_active
    assert logged(resumed, "lookahead/backward_passes") == [3, 4, 5, 6]
    assert "saved with `save_only_model`" in caplog.text and "not saved by a LookaheadTrainer" not in caplog.text


def test_a_checkpoint_that_lost_all_but_the_model_is_not_taken_for_such_a_one(run):
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (run / "checkpoint-4" / name).unlink()
    assert "optimizer is missing" in find_fault(run / "checkpoint-4")


def test_the_state_of_trls_entropy_bonus_is_part_of_a_checkpoint(tmp_path):
    bonus = {"use_adaptive_entropy": True, "entropy_coef": 0.01, "entropy_target": 0.5, "entropy_coef_delta": 0.01}
    train(tmp_path, **SAVING | {"max_steps": 2}, **bonus)
    assert find_fault(tmp_path / "checkpoint-2") is None
    (tmp_path / "checkpoint-2" / "entropy_ctrl_state.json").unlink()
    assert "entropy_ctrl_state.json is missing" in find_fault(tmp_path / "checkpoint-2")


def test_a_model_is_whole_or_it_is_none(tmp_path):
    assert not holds_model(tmp_path)
    save_file({"weight": torch.ones(3)}, tmp_path / "model.safetensors")
    assert holds_model(tmp_path)
    without_end(tmp_path / "model.safetensors")
    assert not holds_model(tmp_path)
