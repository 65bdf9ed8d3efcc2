"""The pool of verifying processes: the plain loop's verdicts, whatever single answers do to it."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from gxpo_trl.tasks import verifier
from gxpo_trl.tasks.maths import Verdict, verify_maths
from gxpo_trl.tasks.verifier import VerifierPool, default_workers, shared_pool


UNDECIDED = Verdict(None, None)
ENDLESS = r"\boxed{9^{9^{9^{9}}}}"
COMPLETIONS = [r"\boxed{7}", r"It is $\boxed{x+1}$.", "No idea.", r"The answer is $\frac12$.", r"\boxed{(1,2)}"] * 4
GOLDS = ["7", "1+x", "7", "0.5", "(2,1)"] * 4


@pytest.fixture
def pool():
    with VerifierPool(workers=2, time_limit=1.0) as pool:
        yield pool


def pids(pool: VerifierPool) -> list[int]:
    return [worker.process.pid for worker in pool._workers]


def is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def in_thread(function) -> threading.Thread:
    thread = threading.Thread(target=function)
    thread.start()
    return thread


WITHOUT_TORCH = f"""
import sys, types
sys.modules["tasks"] = types.ModuleType("tasks")
sys.modules["tasks"].__path__ = [{str(Path(verifier.__file__).parent)!r}]
from tasks.verifier import VerifierPool, shared_pool
"""


def run_script(code: str, *arguments: str) -> subprocess.Popen:
    """Starts a script that has the pool, without the seconds that the rest of the package takes to import."""
    command = [sys.executable, "-c", WITHOUT_TORCH + textwrap.dedent(code), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_verdicts_are_those_of_a_plain_loop(workers):
    with VerifierPool(workers) as pool:
        assert pool.verify(COMPLETIONS, GOLDS) == list(map(verify_maths, COMPLETIONS, GOLDS))
        assert pool.verify([], []) == []
        assert pool.failures == 0


def test_long_and_odd_texts_pass_through_the_pipes(pool):
    texts = [
        "\ud800é\n\x00 " * 100_000 + r"\boxed{7}",
        "answer: $" + "\x01" * 300_000 + "$",
        rf"\boxed{{{'é' * 200_000}}}",
    ]
    assert [verdict.score for verdict in pool.verify(texts, ["7"] * 3)] == [1.0, 0.0, 0.0]


def test_equal_answers_are_verified_once():
    """One hanging answer in 50 completions of different words costs one time limit, and counts 50 times."""
    with VerifierPool(workers=1, time_limit=0.5) as pool:
        pool.verify([r"\boxed{1}"], ["1"])
        started = time.monotonic()
        texts = [f"{number} words, then {ENDLESS}" for number in range(50)]
        assert pool.verify(texts, ["7"] * 50) == [UNDECIDED] * 50
        assert time.monotonic() - started < 5
        assert pool.failures == 50


@pytest.mark.parametrize("hanging", [ENDLESS, r"\boxed{(10^9)!}", r"\boxed{\binom{10^8}{5 \cdot 10^7}}"])
def test_an_answer_that_hangs_is_undecided_and_the_others_are_not(pool, hanging):
    verdicts = pool.verify([r"\boxed{1}", hanging, r"\boxed{2}", r"\boxed{3}"], ["1", "7", "2", "4"])
    assert [verdict.score for verdict in verdicts] == [1.0, None, 1.0, 0.0]
    assert verdicts[1] == UNDECIDED
    assert pool.failures == 1
    assert pool.verify([r"\boxed{7}"], ["7"]) == [Verdict(1.0, "7")]


def test_a_stopped_worker_counts_as_hanging():
    with VerifierPool(workers=1, time_limit=0.5) as pool:
        pool.verify([r"\boxed{1}"], ["1"])
        os.kill(pids(pool)[0], signal.SIGSTOP)
        assert pool.verify([rf"\boxed{{{'1' * 300_000}}}", r"\boxed{2}"], ["1", "2"])[1].score == 1.0  # a full pipe
        assert pool.failures == 1


def test_an_answer_that_would_take_all_memory_gets_none_of_it():
    with VerifierPool(workers=1, time_limit=20.0, memory_limit=2**29) as pool:
        verdicts = pool.verify([r"\boxed{x + 2^{2^{36}} - x}", r"\boxed{2}"], ["7", "2"])
    assert verdicts[0].score in (None, 0.0)  # sympy takes a failed allocation for unequal where it can go on
    assert verdicts[1].score == 1.0


def test_a_worker_that_is_killed_at_work_loses_one_answer(pool):
    pool.time_limit = 60.0
    pool.verify(COMPLETIONS, GOLDS)
    verdicts = []
    thread = in_thread(lambda: verdicts.extend(pool.verify([ENDLESS, *COMPLETIONS], ["7", *GOLDS])))
    wait_until(lambda: len(pool._workers) == 2 and sum(bool(worker.request) for worker in pool._workers) == 1)
    os.kill(next(worker.process.pid for worker in pool._workers if worker.request), signal.SIGKILL)
    thread.join(timeout=30)
    assert verdicts == [UNDECIDED, *map(verify_maths, COMPLETIONS, GOLDS)]
    assert pool.failures == 1


def test_all_workers_killed_in_the_middle_of_a_batch(pool):
    completions = [rf"\boxed{{(x+{number})^2}}" for number in range(60)]
    golds = [rf"x^2 + {2 * number} x + {number**2}" for number in range(60)]
    pool.verify([r"\boxed{1}", r"\boxed{2}"], ["1", "2"])
    verdicts = []
    thread = in_thread(lambda: verdicts.extend(pool.verify(completions, golds)))
    wait_until(lambda: any(worker.request for worker in pool._workers))
    for pid in pids(pool):
        os.kill(pid, signal.SIGKILL)
    thread.join(timeout=60)
    undecided = [verdict for verdict in verdicts if verdict == UNDECIDED]
    assert len(undecided) == pool.failures <= 2
    assert [verdict.score for verdict in verdicts].count(1.0) == 60 - len(undecided)


def test_a_worker_that_died_between_calls_loses_nothing(pool):
    pool.verify(COMPLETIONS, GOLDS)
    for pid in pids(pool):
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda pid=pid: not is_running(pid))
    assert pool.verify([r"\boxed{7}"], ["7"]) == [Verdict(1.0, "7")]
    assert pool.failures == 0


def test_four_threads_get_their_own_verdicts(pool):
    results = {}

    def verify(number: int) -> None:
        results[number] = [pool.verify([rf"\boxed{{{number}}}"], [gold])[0].score for gold in "0123" * 5]

    for thread in [in_thread(lambda number=number: verify(number)) for number in range(4)]:
        thread.join(timeout=30)
    assert results == {number: [float(number == gold) for gold in (0, 1, 2, 3)] * 5 for number in range(4)}


def test_an_interrupt_leaves_no_stale_verdicts():
    """A batch is interrupted while an answer hangs; the next one gets its own verdicts."""
    code = """
        import os, signal, threading
        pool = VerifierPool(workers=1, time_limit=600.0)
        pool.verify(["\\\\boxed{1}"], ["1"])
        threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        try:
            pool.verify([sys.argv[1], "\\\\boxed{2}"], ["7", "2"])
        except KeyboardInterrupt:
            print([verdict.score for verdict in pool.verify(["\\\\boxed{3}", "\\\\boxed{4}"], ["3", "7"])])
    """
    assert run_script(code, ENDLESS).communicate(timeout=300)[0].split("\n")[0] == "[1.0, 0.0]"


def test_nothing_is_left_after_close():
    pool = VerifierPool(workers=2)
    pool.verify(COMPLETIONS, GOLDS)
    started = pids(pool)
    assert len(started) == 2 and all(map(is_running, started))
    pool.close()
    pool.close()
    assert not any(map(is_running, started))
    with pytest.raises(ValueError, match="closed"):
        pool.verify([r"\boxed{1}"], ["1"])


@pytest.mark.parametrize("completion", [r"\boxed{1}", ENDLESS], ids=["idle", "at work"])
def test_workers_end_with_their_parent(completion):
    """Killed, so that it can't clean up."""
    code = """
        import threading
        pool = VerifierPool(workers=1, time_limit=1.0)
        pool.verify(["\\\\boxed{1}"], ["1"])
        thread = threading.Thread(target=pool.verify, args=([sys.argv[1]], ["7"]))
        thread.start()
        print(pool._workers[0].process.pid, flush=True)
        input()
    """
    parent = run_script(code, completion)
    worker = int(parent.stdout.readline())
    assert is_running(worker)
    parent.kill()
    parent.wait()
    wait_until(lambda: not is_running(worker), seconds=5)


def test_a_forked_child_starts_its_own_workers(pool):
    pool.verify(COMPLETIONS, GOLDS)
    parents = set(pids(pool))
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        scores = [verdict.score for verdict in pool.verify([r"\boxed{1}", r"\boxed{2}"], ["1", "3"])]
        os.write(writing, json.dumps([scores, pids(pool)]).encode())
        os._exit(0)
    os.waitpid(child, 0)
    scores, own = json.loads(os.read(reading, 10_000))
    assert scores == [1.0, 0.0]
    assert own and not parents & set(own)
    assert set(pids(pool)) == parents
    assert pool.verify([r"\boxed{7}"], ["7"]) == [Verdict(1.0, "7")]
    wait_until(lambda: not any(map(is_running, own)))


def test_each_rank_of_a_launch_scores_its_own(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(
        WITHOUT_TORCH + "import json, os, pathlib\n"
        "rank = int(os.environ['RANK'])\n"
        "scores = [v.score for v in shared_pool().verify(['\\\\boxed{%d}' % rank] * 2, ['0', '1'])]\n"
        "result = {'scores': scores, 'workers': shared_pool().workers, 'same': shared_pool() is shared_pool()}\n"
        "pathlib.Path(sys.argv[1], f'{rank}.json').write_text(json.dumps(result))\n"
    )
    command = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(script), str(tmp_path)]
    subprocess.run([sys.executable, *command], check=True, timeout=120, capture_output=True)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert (first["scores"], second["scores"]) == ([1.0, 0.0], [0.0, 1.0])
    assert first["same"] and first["workers"] == max(default_workers() // 2, 1)


def test_files_of_the_working_folder_are_not_imported(tmp_path, monkeypatch):
    for name in ("json.py", "sympy.py", "math_verify.py"):
        (tmp_path / name).write_text("raise SystemExit(1)")
    monkeypatch.chdir(tmp_path)
    with VerifierPool(workers=1) as pool:
        assert pool.verify([r"\boxed{7}"], ["7"]) == [Verdict(1.0, "7")]


def test_a_worker_has_no_rank_and_no_gpu(monkeypatch, pool):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    pool.verify([r"\boxed{7}"], ["7"])
    environment = Path(f"/proc/{pids(pool)[0]}/environ").read_bytes().split(b"\0")
    assert b"CUDA_VISIBLE_DEVICES=" in environment
    assert not [entry for entry in environment if entry.startswith((b"RANK=", b"MASTER_ADDR="))]


def test_workers_that_cannot_start_are_reported():
    with VerifierPool(workers=1, memory_limit=2**20) as pool, pytest.raises(RuntimeError, match="memory_limit"):
        pool.verify([r"\boxed{7}"], ["7"])


@pytest.mark.parametrize("local_world_size, workers", [("1", 6), ("2", 3), ("4", 1), ("100", 1)])
def test_ranks_share_the_cores(monkeypatch, local_world_size, workers):
    monkeypatch.setattr(verifier.os, "sched_getaffinity", lambda process: range(6))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local_world_size)
    assert default_workers() == workers
    assert VerifierPool().workers == workers


@pytest.mark.parametrize(
    "settings, message", [({"workers": 0}, "`workers` is 0"), ({"time_limit": 0.0}, "`time_limit` is 0.0")]
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        VerifierPool(**settings)


def test_each_completion_needs_a_gold(pool):
    with pytest.raises(ValueError, match="2 completions and 1 golds"):
        pool.verify(["a", "b"], ["a"])


def test_the_shared_pool_is_one():
    assert shared_pool() is shared_pool()
