"""Problem sets: every loader on small files of the shape that the Hub has, and what can be wrong with one."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from datasets import Dataset

from gxpo_trl.tasks import load_arithmetic, load_problems, resolve_dataset
from gxpo_trl.tasks.answers import verify_maths
from gxpo_trl.tasks.datasets import PROBLEM_SETS, find_overlap, fold, hub_dataset, problem_set, to_prompts
from gxpo_trl.tasks.task import load_task


DAPO = "Solve the following math problem step by step. The last line is …\n\n{}\n\nRemember to put your answer on …"
GPQA = {"Question": "Which?", "Correct Answer": "this", **{f"Incorrect Answer {i}": f"no {i}" for i in (1, 2, 3)}}
LIKE_THE_HUBS = {  # rows as they are there, and the problem and the answer that they come to
    "MATH-3to5": (
        [
            {"problem": "P", "level": "Level 5", "type": "Algebra", "solution": r"Thus \boxed{\frac{1}{2}}."},
            {"problem": "easy", "level": "Level 2", "type": "Algebra", "solution": r"\boxed{1}"},
        ],
        [("P", r"\frac{1}{2}")],
    ),
    "MATH-train": (
        [{"problem": "easy", "level": "Level 2", "type": "Algebra", "solution": r"\boxed{1}"}],
        [("easy", "1")],
    ),
    "GSM8K-train": ([{"question": "P", "answer": "He has <<1+1=2>>2.\n#### 1,002"}], [("P", "1,002")]),
    "DAPO-Math-17k": (
        [
            {
                "prompt": [{"role": "user", "content": DAPO.format("P\n\nin two parts")}],
                "reward_model": {"ground_truth": "34"},
            }
        ]
        * 3,
        [("P\n\nin two parts", "34")],
    ),
    "Skywork-OR1": (
        [{"prompt": [{"role": "user", "content": "P"}], "reward_model": {"ground_truth": json.dumps([r"\pi"])}}],
        [("P", r"\pi")],
    ),
    "OpenR1-Math": ([{"problem": "P", "answer": "7"}, {"problem": "proof", "answer": None}], [("P", "7")]),
    "MATH-500": ([{"problem": "P", "answer": r"\frac43", "level": 5}], [("P", r"\frac43")]),
    "AMC23": ([{"question": "P", "answer": "27.0"}], [("P", "27.0")]),
    "GSM8K": ([{"question": "P", "answer": "So.\n#### 18"}], [("P", "18")]),
    "Minerva": ([{"question": "P", "answer": "4.5e33"}], [("P", "4.5e33")]),
    "OlympiadBench": ([{"question": "P", "final_answer": ["$1$", "$2$"]}], [("P", "$1$, $2$")]),
    "AIME24": ([{"problem": "P", "answer": "025"}], [("P", "025")]),
    "AIME25": ([{"problem": "P", "answer": "70"}], [("P", "70")]),
    "OlymMATH-easy": ([{"problem": "P", "answer": "$7$"}], [("P", "$7$")]),
    "GPQA-diamond": ([GPQA, *({**GPQA, "Question": f"Which of {i}?"} for i in range(12))], None),
    "MMLU-Pro": ([{"question": "P", "options": ["x", "y"], "answer": "B"}], None),
}


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The named sets, with their rows in local files."""

    def of(name: str) -> None:
        path = write(tmp_path / f"{name}.jsonl", LIKE_THE_HUBS[name][0])
        here = dataclasses.replace(PROBLEM_SETS[name], path="json", data_files=path, config=None, split="train")
        monkeypatch.setitem(PROBLEM_SETS, name, here)

    return of


@pytest.mark.parametrize("name", [name for name, (_, expected) in LIKE_THE_HUBS.items() if expected])
def test_a_named_set_is_read_from_the_form_it_has(hub, name):
    hub(name)
    problems = load_problems(name)
    assert problems.column_names == ["id", "problem", "answer"]
    assert list(zip(problems["problem"], problems["answer"], strict=True)) == LIKE_THE_HUBS[name][1]
    for answer in problems["answer"]:
        assert verify_maths(rf"\boxed{{{answer}}}", answer).score == 1.0


def test_every_name_is_tried():
    assert LIKE_THE_HUBS.keys() | {"arithmetic"} == PROBLEM_SETS.keys()


def test_choices_are_shuffled_the_same_way_every_time(hub):
    hub("GPQA-diamond")
    first, second = load_problems("GPQA-diamond")[0], load_problems("GPQA-diamond")[0]
    assert first == second
    shown = dict(line.split(". ", 1) for line in first["problem"].splitlines() if line[1:3] == ". ")
    assert shown[first["answer"]] == "this" and set(shown.values()) == {"this", "no 1", "no 2", "no 3"}
    assert set(load_problems("GPQA-diamond")["answer"]) == set("ABCD")
    hub("MMLU-Pro")
    row = load_problems("MMLU-Pro")[0]
    assert "A. x\nB. y" in row["problem"] and row["answer"] == "B"
    assert problem_set("MMLU-Pro").kind == problem_set("GPQA-diamond").kind == "choice"


def test_the_embedded_benchmark_is_the_held_out_split():
    problems, task = load_problems("arithmetic"), load_arithmetic()
    assert problems["answer"][:] == task["test"]["solution"][:] and len(problems) == 200
    assert problems["problem"][0] == task["test"][0]["prompt"][0]["content"]
    assert find_overlap(task["train"], problems) == []


def test_the_chosen_columns_are_read_where_data_has_the_usual_ones_too(tmp_path):
    """Other columns stay as they are, for the reward."""
    row = {"question": "What is 1 + 1?", "problem": "P7", "answer": "We add. #### 2", "final": "2"}
    write(path := tmp_path / "mine.jsonl", [row])
    columns = {"problem_column": "question", "answer_column": "final"}
    examples = resolve_dataset(str(path), **columns)["train"]
    Dataset.from_list([row]).save_to_disk(tmp_path / "saved")
    for found in (examples, resolve_dataset(str(tmp_path / "saved"), **columns)["train"]):
        assert found[0]["prompt"][0]["content"] == "What is 1 + 1?" and found[0]["solution"] == "2"
        assert {name: found[0][name] for name in row} == row
    task = load_task(str(path), **columns)
    assert task.problems[0]["prompt"] == examples[0]["prompt"] and task.golds(task.problems) == ["2"]
    problems = load_problems(str(path), **columns)
    assert (problems[0]["problem"], problems[0]["answer"]) == ("What is 1 + 1?", "2")
    assert find_overlap(examples, task.problems) and find_overlap(examples, problems.remove_columns("question"))
    swapped = load_task(str(path), problem_column="question", answer_column="answer")
    assert swapped.golds(swapped.problems) == ["We add. #### 2"] == swapped.problems["solution"][:]


def test_a_named_answer_of_data_with_prompts_is_the_solution(tmp_path):
    write(path := tmp_path / "mine.jsonl", [{"prompt": "1 + 1?", "solution": "We add.", "answer": "2"}])
    for column, gold in (("answer", "2"), (None, "We add.")):
        examples = resolve_dataset(str(path), answer_column=column)["train"]
        task = load_task(str(path), answer_column=column)
        assert examples["solution"][:] == task.golds(task.problems) == [gold] and examples["answer"][:] == ["2"]


def test_not_a_number_is_an_empty_cell(tmp_path):
    path = str(tmp_path / "mine.parquet")
    Dataset.from_dict({"prompt": ["a", "b"], "answer": [1.5, float("nan")]}).to_parquet(path)
    assert resolve_dataset(path)["train"]["solution"][:] == ["1.5", ""]


@pytest.mark.parametrize(
    "written, gold",
    [
        ('"2024-01-05"', "2024-01-05"),
        ('"2024-01-05 10:30:00"', "2024-01-05 10:30:00"),
        ("9007199254740993", "9007199254740993"),
        ("123456789012345678901234567890", "1.2345678901234568e+29"),
        ("7.0", "7"),
        ("[1.0, 2.5]", "1, 2.5"),
        ("[[1, 2], [3, 4]]", "(1, 2), (3, 4)"),
    ],
)
def test_a_cell_of_json_is_what_was_written(tmp_path, written, gold):
    """Of integers that don't fit, the loader keeps the first digits."""
    (path := tmp_path / "mine.jsonl").write_text(f'{{"problem": "P", "answer": {written}}}\n')
    assert to_prompts(load_problems(str(path)))["solution"][:] == [gold]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_files_are_read_by_their_columns(tmp_path, suffix):
    path, rows = str(tmp_path / f"mine.{suffix}"), [{"q": "1 + 1?", "a": 2.0}, {"q": "2 + 3?", "a": 5.0}]
    if suffix == "parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif suffix == "json":
        Path(path).write_text(json.dumps(rows))
    else:
        write(Path(path), rows)
    problems = load_problems(path, problem_column="q", answer_column="a", limit=5)
    assert problems["answer"][:] == ["2", "5"] and problems["id"][:] == ["0", "1"]
    assert load_problems(path, problem_column="q", answer_column="a", limit=1)["problem"][:] == ["1 + 1?"]


def test_prompts_follow_the_template():
    problems = Dataset.from_list([{"id": "0", "problem": "What {is} it?", "answer": "2"}])
    row = to_prompts(problems, "Q: {problem}\nUse \\boxed{{}}.", system_prompt="Be brief.")[0]
    assert row["prompt"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Q: What {is} it?\nUse \\boxed{}."},
    ]
    assert row["solution"] == "2"
    assert to_prompts(problems)[0]["prompt"] == [{"role": "user", "content": "What {is} it?"}]


def test_a_recipe_may_name_a_problem_set_or_a_file(tmp_path, hub):
    hub("MATH-500")
    assert resolve_dataset("MATH-500", prompt="Q: {problem}")["train"][0]["prompt"][0]["content"] == "Q: P"
    path = write(tmp_path / "mine.jsonl", [{"problem": "P", "answer": "1"}])
    assert resolve_dataset(path, split="mine")["mine"]["solution"][:] == ["1"]


@pytest.mark.parametrize("name", ["gxpo_trl/arithmetic", "owner/dataset"])
def test_a_prompt_that_would_not_be_used_is_an_error(name):
    with pytest.raises(ValueError, match="would not use `prompt`"):
        resolve_dataset(name, prompt="Q: {problem}")


def test_overlap_is_found_whatever_the_spelling():
    train = Dataset.from_list([{"problem": r"Find $x$ if $\left(x+1\right)^2=4$."}, {"problem": "Other"}])
    evaluation = Dataset.from_list([{"problem": "find x  if (x+1)^2 = 4"}, {"problem": "Find x if (x-1)^2=4"}])
    assert find_overlap(train, evaluation) == ["find x  if (x+1)^2 = 4"]
    prompts = Dataset.from_list([{"prompt": [{"role": "user", "content": "Other"}]}])
    assert find_overlap(prompts, train) == ["Other"]
    assert fold("What is 2.5 + 1?") != fold("What is 25 + 1?") and fold("(1,2)") != fold("12")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"name": "MATH500"}, "did you mean `MATH-500`"),
        ({"name": "nowhere.jsonl"}, "no file nowhere.jsonl"),
        ({"name": "FOLDER/a.csv"}, "is not one of .json"),
        (
            {"name": "FOLDER/a.jsonl", "problem_column": "question"},
            "no column `question`; set `problem_column` to one of",
        ),
        (
            {"name": "FOLDER/a.jsonl", "answer_column": "gold"},
            "no column `gold`; set `answer_column` to one of problem",
        ),
        ({"name": "FOLDER/a.jsonl"}, "1 rows without a problem or an answer, the first is row 1"),
        ({"name": "FOLDER/a.jsonl", "split": "dev"}, "can't be loaded: Unknown split"),
        ({"name": "arithmetic", "split": "dev"}, "no split 'dev'"),
        ({"name": "math-500"}, "did you mean `MATH-500`"),
        ({"name": "FOLDER/b.csv"}, "There is no file"),
        ({"name": "FOLDER/empty.jsonl"}, "can't be loaded"),
        ({"name": "FOLDER/broken.jsonl"}, "can't be loaded"),
        ({"name": "arithmetic", "kind": "math"}, "did you mean `maths`"),
        ({"name": "arithmetic", "problem_column": "q"}, "columns and a kind of its own"),
        ({"name": "arithmetic", "limit": 0}, "`limit`"),
    ],
    ids=str,
)
def test_bad_input_is_named(tmp_path, arguments, message):
    write(tmp_path / "a.jsonl", [{"problem": "P", "answer": "1"}, {"problem": "Q", "answer": ""}])
    (tmp_path / "a.csv").write_text("problem,answer\n")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"problem": \n')
    arguments["name"] = arguments["name"].replace("FOLDER", str(tmp_path))
    with pytest.raises(ValueError, match=message):
        load_problems(**arguments)


def test_a_set_of_which_nothing_is_left_is_an_error(tmp_path, monkeypatch):
    path = write(tmp_path / "easy.jsonl", [LIKE_THE_HUBS["MATH-3to5"][0][1]])
    here = dataclasses.replace(PROBLEM_SETS["MATH-3to5"], path="json", data_files=path)
    monkeypatch.setitem(PROBLEM_SETS, "MATH-3to5", here)
    with pytest.raises(ValueError, match="MATH-3to5 has no problems"):
        load_problems("MATH-3to5")


@pytest.mark.parametrize("prompt", ["Solve it.", "Solve {this}.", r"{problem} in \boxed{}", "{problem", "{problem.x}"])
def test_a_template_without_the_problem_is_an_error(prompt):
    with pytest.raises(ValueError, match="`prompt`"):
        to_prompts(Dataset.from_list([{"id": "0", "problem": "P", "answer": "1"}]), prompt)


def test_several_sets_are_one_without_what_they_share(hub):
    hub("MATH-3to5")
    hub("MATH-train")
    hub("DAPO-Math-17k")
    rows = resolve_dataset("DAPO-Math-17k + MATH-train+MATH-train", prompt="Solve: {problem}")["train"]
    assert [(row["id"], row["problem"], row["solution"]) for row in rows] == [
        ("0", "P\n\nin two parts", "34"),
        ("1", "easy", "1"),
    ]
    assert rows[1]["prompt"] == [{"role": "user", "content": "Solve: easy"}]
    with pytest.raises(ValueError, match="no problem set `MATH-trian`; did you mean `MATH-train`"):
        resolve_dataset("DAPO-Math-17k+MATH-trian")


def test_where_a_set_is_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "folder").mkdir(parents=True)
    assert hub_dataset("data/folder") is None
    assert hub_dataset("MATH-500") == "HuggingFaceH4/MATH-500" and hub_dataset("owner/set") == "owner/set"
    local = ("gxpo_trl/arithmetic", "arithmetic", "reasoning_gym/chain_sum", "data/mine.jsonl")
    for elsewhere in (*local, "DAPO-Math-17k+MATH-train", None):
        assert hub_dataset(elsewhere) is None


@pytest.mark.parametrize(
    "content, said",
    [
        ("", "it is empty"),
        ("\n\n", "it is empty"),
        ('{"problem": "1+1", "answer": "2"', "JSON parse error: Missing a comma .* in row 0"),
    ],
)
@pytest.mark.parametrize("form", ["file", "folder"])
def test_a_file_that_cannot_be_read_says_why(tmp_path, form, content, said):
    file = tmp_path / "data" / "train.jsonl"
    file.parent.mkdir()
    file.write_text(content)
    path = file if form == "file" else file.parent
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} can't be loaded: {said}\.$"):
        resolve_dataset(str(path))
