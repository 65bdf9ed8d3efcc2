"""What we rely on where vLLM samples: in training on TRL's class for it, in `gxpo eval` on vLLM itself.

vLLM need not be installed for the first part: a stand-in answers for TRL's class.
"""

from importlib.util import find_spec

import pytest
from contracts import Name, check, parameter_names
from helpers import make_trainer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.generation.vllm_generation import VLLMGeneration

from gxpo_trl.evaluation.sampling import vllm_sampler
from gxpo_trl.evaluation.settings import EvaluationArguments


BOTH = (GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)
SAMPLING, BENCHMARKS = "evaluation/sampling.py", "callbacks/benchmarks.py"
WEIGHTS = "trainer/vllm.py"
OF_TRL = "trl.generation.vllm_generation.VLLMGeneration"

NAMES_OF_TRL = [
    Name("trl.GRPOTrainer", "vllm_generation", "scripts/", "finds vLLM there when a trainer is done"),
    Name(OF_TRL, "llm", "scripts/", "finds the engine of this process there"),
    Name(OF_TRL, "vllm_client", "scripts/", "finds the connection to vLLM's server there"),
    Name("trl.generation.vllm_client.VLLMClient", "close_communicator", "scripts/", "leaves the server with it", ""),
    Name("trl.GRPOTrainer", "use_vllm", "trainer/grouped.py", "leaves sampling to vLLM by it"),
    Name("trl.RLOOTrainer", "use_vllm", "trainer/grouped.py", "leaves sampling to vLLM by it"),
    Name("trl.RLOOTrainer", "num_generations_eval", BENCHMARKS, "refuses numbers of samples with vLLM by it"),
    Name(
        *("trl.GRPOTrainer", "vllm_importance_sampling_correction", "trainer/layout.py"),
        "knows by it that VESPO's loss sees padding",
    ),
    Name("trl.GRPOTrainer", "vllm_generation", "trainer/trainer.py", "has adapters merged out of place there"),
    Name("trl.GRPOTrainer", "use_vllm", "trainer/trainer.py", "knows by it whether vLLM samples"),
    Name(OF_TRL, "_iter_named_params", WEIGHTS, "sends weights of its own in the place of these", ""),
    Name(OF_TRL, "_fix_param_name_to_vllm", WEIGHTS, "names weights with it as vLLM does", "name, extra_prefixes"),
    Name(OF_TRL, "_dist", WEIGHTS, "gathers parameters with it"),
    Name(OF_TRL, "model", WEIGHTS, "finds the model there"),
    Name(OF_TRL, "accelerator", WEIGHTS, "knows by it on which device parameters are put together"),
    Name(OF_TRL, "mode", WEIGHTS, "knows by it whether the engine is in this process"),
    Name(OF_TRL, "llm", WEIGHTS, "asks the engine for the dtype of its weights"),
    Name("trl.distributed.DistributedBackend", "gather_params", WEIGHTS, "has ZeRO-3's shards put together", "params"),
    Name("trl.distributed.DistributedBackend", "fsdp_version", WEIGHTS, "leaves FSDP1 to TRL by it"),
    Name("trl.GRPOConfig", "vllm_mode", "scripts/", "says by it where vLLM's memory is taken"),
    Name("trl.GRPOConfig", "vllm_gpu_memory_utilization", "scripts/", "says how much memory vLLM takes"),
]

NAMES_OF_VLLM = [
    Name("vllm.LLM", "llm_engine", WEIGHTS, "finds the engine there"),
    Name("vllm.v1.engine.llm_engine.LLMEngine", "model_config", WEIGHTS, "asks it for the dtype of vLLM's weights"),
    Name("vllm.config.ModelConfig", "dtype", WEIGHTS, "rounds to it as vLLM does"),
    Name("vllm.LLM", "llm_engine", SAMPLING, "finds the engine there"),
    Name("vllm.v1.engine.llm_engine.LLMEngine", "engine_core", SAMPLING, "finds there what holds the memory"),
    Name("vllm.v1.engine.core_client.EngineCoreClient", "shutdown", SAMPLING, "gives the memory back with it"),
    Name(
        *("vllm.v1.engine.llm_engine.LLMEngine", "model_executor", SAMPLING),
        "finds there what holds the memory of an engine in this process",
    ),
    Name("vllm.v1.executor.abstract.Executor", "shutdown", SAMPLING, "gives the memory back with it", ""),
    Name(
        *("vllm", "LLM", SAMPLING, "loads a checkpoint with it"),
        "model, * dtype, gpu_memory_utilization",
    ),
    Name("vllm.engine.arg_utils.EngineArgs", "max_model_len", SAMPLING, "has vLLM make room for so many tokens"),
    Name("vllm.LLM", "generate", SAMPLING, "samples with it", "prompts, sampling_params, * use_tqdm"),
    Name(
        *("vllm", "SamplingParams", SAMPLING, "asks for samples with it"),
        "* temperature, top_p, top_k, min_p, repetition_penalty, max_tokens, seed",
    ),
    Name("vllm", "TokensPrompt", SAMPLING, "gives prompts as tokens with it"),
    Name("vllm.outputs.RequestOutput", "outputs", SAMPLING, "reads the samples of a prompt there"),
    *(
        Name("vllm.outputs.CompletionOutput", name, SAMPLING, use)
        for name, use in (
            ("text", "reads a completion there"),
            ("token_ids", "counts a completion's tokens there"),
            ("finish_reason", "knows by `length` that a completion was cut"),
        )
    ),
]
NAMES = NAMES_OF_TRL + NAMES_OF_VLLM


@pytest.mark.parametrize("touched", NAMES_OF_TRL, ids=str)
def test_the_names_that_we_touch_of_trl_are_there(touched):
    check(touched)


@pytest.mark.vllm
@pytest.mark.parametrize("touched", NAMES_OF_VLLM, ids=str)
def test_the_names_that_we_touch_of_vllm_are_there(touched):
    pytest.importorskip("vllm", reason="vLLM, an extra, is not installed")
    check(touched)


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_the_import_fails_as_we_expect():
    with pytest.raises(ValueError, match="needs vLLM"):
        vllm_sampler("model", EvaluationArguments(backend="vllm", samples=1, temperature=0.0), 10).__enter__()


class SpyingGeneration:
    """Stands in for TRL's class. Answers each prompt with its length, and writes down what it was asked."""

    def __init__(self):
        self.calls = []

    def sync_weights(self):
        self.calls.append("sync")

    def generate(self, prompts, images, num_generations, profiler=None):
        self.calls.append(("generate", num_generations))
        completions = [[len(prompt)] for prompt in prompts]
        return prompts, completions, [[[-0.5]] for _ in prompts], None


def test_trls_class_for_vllm_is_asked_so():
    generate, sync = parameter_names(VLLMGeneration.generate), parameter_names(VLLMGeneration.sync_weights)
    assert generate == ["prompts", "images", "num_generations", "profiler"] and sync == [], (
        "TRL's VLLMGeneration takes other arguments in `generate` or `sync_weights` now: these tests stand in for it, "
        "and callbacks/benchmarks.py goes through it."
    )


@pytest.fixture(params=BOTH, ids=["GRPO", "RLOO"])
def sampling_with_vllm(request, tmp_path):
    """A plain trainer of TRL that takes a stand-in for vLLM."""
    trainer = make_trainer(tmp_path, *request.param, scripted=False)
    trainer.use_vllm, trainer.vllm_generation, trainer._last_loaded_step = True, SpyingGeneration(), -1
    return trainer


def sample(trainer, num_generations: int):
    more = (num_generations,) if isinstance(trainer, GRPOTrainer) else ()
    output = trainer._generate_single_turn([[5, 6], [5, 6], [8], [8]], None, {}, *more)
    return output[0] if isinstance(trainer, GRPOTrainer) else output


def test_weights_go_to_vllm_once_for_each_step_and_before_it_samples(sampling_with_vllm):
    trainer = sampling_with_vllm
    sample(trainer, 2)
    sample(trainer, 2)
    trainer.state.global_step += 1
    sample(trainer, 2)
    kinds = [call if call == "sync" else "generate" for call in trainer.vllm_generation.calls]
    assert kinds == ["sync", "generate", "generate", "sync", "generate"], (
        f"{type(trainer).__name__} of TRL does not send its weights to vLLM once for each step any more, when it "
        "samples: trainer/update.py has vLLM see committed weights only because of that."
    )


def test_completions_of_vllm_are_returned_as_those_of_generate_are(sampling_with_vllm):
    assert sample(sampling_with_vllm, 2) == [[2], [2], [1], [1]], (
        f"{type(sampling_with_vllm).__name__}._generate_single_turn of TRL does not return one completion for each "
        "prompt with vLLM any more: callbacks/benchmarks.py samples benchmarks through it."
    )


def test_grpo_asks_vllm_for_as_many_samples_as_it_is_told_and_rloo_for_its_own_number(sampling_with_vllm):
    trainer = sampling_with_vllm
    trainer.model.eval()
    trainer.num_generations_eval = 4
    sample(trainer, 2)
    expected = 2 if isinstance(trainer, GRPOTrainer) else 4
    assert trainer.vllm_generation.calls[-1] == ("generate", expected), (
        f"{type(trainer).__name__} of TRL asks vLLM for another number of samples of a prompt now: "
        "`_why_not_sampled` in callbacks/benchmarks.py says which `eval_samples` can be had with vLLM."
    )
