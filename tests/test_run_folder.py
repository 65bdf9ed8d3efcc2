"""What lies where in the folder of a run, and that other libraries still call their files so."""

import pytest
from huggingface_hub import constants
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME as MODEL_CONFIG_NAME
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from gxpo_trl import run_folder


def test_other_libraries_files_have_these_names():
    assert run_folder.TRAINER_STATE_NAME == TRAINER_STATE_NAME
    assert (run_folder.ADAPTER_CONFIG, run_folder.ADAPTER_WEIGHTS) == (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)
    assert run_folder.MODEL_CONFIG == MODEL_CONFIG_NAME
    assert run_folder.MODEL_WEIGHTS == SAFE_WEIGHTS_NAME
    assert run_folder.MODEL_INDEX == SAFE_WEIGHTS_INDEX_NAME
    assert run_folder.TOKENIZER_CONFIG == TOKENIZER_CONFIG_FILE
    assert run_folder.CARD_NAME == constants.REPOCARD_NAME


def test_steps_are_found_by_number_and_nothing_else_is(tmp_path):
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-11.partial", "checkpoint", "runs"):
        (tmp_path / name).mkdir()
    assert list(run_folder.saved_steps(tmp_path)) == [9, 10]
    run_folder.step_folder(tmp_path, 20).mkdir(parents=True)
    assert list(run_folder.saved_steps(tmp_path / "trajectory")) == [20]
    assert run_folder.saved_steps(tmp_path / "nowhere") == {}


def test_a_checkpoint_is_one_of_trainers(tmp_path):
    assert run_folder.checkpoint_step(tmp_path / f"{PREFIX_CHECKPOINT_DIR}-200") == 200
    assert run_folder.checkpoint_step(run_folder.step_folder(tmp_path, 200)) is None
    assert run_folder.checkpoint_step(tmp_path / "checkpoint-200.partial") is None


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path):
    path = tmp_path / "run.json"
    run_folder.write_whole(path, "α")
    with pytest.raises(UnicodeEncodeError):
        run_folder.write_whole(path, "β\ud800")
    assert path.read_text(encoding="utf-8") == "α"


def test_numbers_beyond_what_numpy_has_as_whole_ones_are_floats():
    """A figure takes others for objects, and fails on them."""
    small, large, endless = run_folder.parse_json(f"[{2**53 - 1}, {10**30}, {'9' * 5000}]", "a file")
    assert small == 2**53 - 1 and isinstance(small, int)
    assert large == 1e30 and isinstance(large, float)
    assert endless == float("inf")
