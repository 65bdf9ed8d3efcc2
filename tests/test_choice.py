"""Which letter a completion chooses."""

import time

import pytest

from gxpo_trl.tasks.answers.choice import LETTERS, choose, format_choices


@pytest.mark.parametrize(
    "completion, letter",
    [
        (r"\boxed{C}", "C"),
        (r"So it is \boxed{\text{C}}.", "C"),
        (r"\boxed{(C)}", "C"),
        (r"\boxed{\text{(C)}}", "C"),
        (r"\boxed{C.}", "C"),
        ("Answer: C", "C"),
        ("The answer is (C).", "C"),
        ("the correct answer is: **C**", "C"),
        ("Of these I take\n**C**", "C"),
        ("**C.**", "C"),
        (r"The answer is A. No: \boxed{C}", "C"),  # the last statement counts
        (r"\boxed{C}. The answer is A, I thought.", "C"),  # a box outweighs words
        (r"\boxed{\textbf{C}}", "C"),
        (r"\boxed{\mathrm{C}}", "C"),
        (r"\boxed{c}", "C"),
        (r"\boxed{C. 42 m/s}", "C"),
        (r"\boxed{\text{C. photon}}", "C"),
        ("**Answer**: C", "C"),
        ("Answer: $C$", "C"),
        (r"Answer: \(C\)", "C"),
        ("the answer is option C", "C"),
        ("The answer is B.\nNo, the answer is C.", "C"),
        ("The answer is A train.", None),
        ("The answer is: A good answer", None),
        ("The answer I gave was wrong.", None),
        ("My answer: I think it's B", "B"),
        ("Answer: E = mc^2", None),
        ("A train leaves at noon.", None),
        ("The answer is Apples.", None),
        ("The answer is A's brother.", None),
        (r"\boxed{7}", None),
        (r"\boxed{CAD}", None),
        ("**C** is wrong, and so are the others.", None),
        ("", None),
        ("(C)", "C"),
        ("C. photon", "C"),
        ("I would pick C — a safe choice.", "C"),
        ("So it must be B, or rather: the answer seems to be C.", "C"),
        ("Therefore, C is the best answer.", "C"),
        (r"\boxed{C: A longer option}", "C"),
        ("**C**, not **D**: the answer is **C**, not **D**.", "C"),
        ("If the answer is (B), that fails. Is the answer (D)? No.", None),
        ("The answer isn't (C).", None),
        ("The answer is A, B, C or D.", None),
        (r"\boxed{A} or \boxed{C}", None),
        (r"\boxed{ABCD}", None),
        (r"<think>\boxed{B}</think> The answer is (C).", "C"),
        (r"<think>\boxed{C}", None),
        ("答案：C", "C"),
        ("答案是C。", "C"),
        ("所以答案为(C)选项", "C"),
        ("The answer is 'C'.", "C"),
        ("The answer is C's brother.", None),
        ("The answer is C. Option D is wrong because of x.", "C"),  # what is said of others later
        ("Answer: C\n\nOption A: this is false.\nOption B: also false.\nOption D: impossible.", "C"),
        ("**Answer: C**\n\n- Option A is incorrect.\n- Option D fails.", "C"),
        ("The answer is (C). Choice (A) does not satisfy the equation.", "C"),
        ("The answer is C. Many students choose A.", "C"),
        ("Final answer: C. It is a common mistake to pick A.", "C"),
        ("So the correct option is C. (Option D would be right if gravity were zero.)", "C"),
        ("The correct choice is C; choose D only for negative x.", "C"),
        ("My choice: C. Answer B would require energy.", "C"),
        ("The correct option C follows from the second law. Option B ignores it.", "C"),
        ("I choose C over option D.", "C"),
        ("Let us go with C, although option B is close.", "C"),
        ("The answer is B.\nWait, option D is wrong too, so the answer is C.", "C"),
        ("Option A is incorrect. Option B is incorrect. So C.", "C"),
        ("Option A has no units. Therefore, (C).", "C"),
        ("C\n\nReason: option A has no units.", "C"),  # in the first line
        ("A\nB\nC\nNone of these.", None),
        ("Only option C.", "C"),
        ("Option C: the photon", "C"),
        ("Option A: the electron\nOption C: the photon", None),
        ("We select (C)", "C"),
        ("Option C is wrong.", None),
        ("The answer is C is not true.", None),
        ("The answer is C. (The answer would be A if the mass doubled.)", "C"),  # under a condition
        ("The answer is C. The correct choice would be A if the mass doubled.", "C"),
        ("The answer is C. If the mass doubled, the answer would be A.", "C"),
        ("Had the mass doubled, A would be the right answer. But the answer is C.", "C"),
        ("The answer is C. Had the mass doubled, A would be the right answer.", "C"),
        ("If we neglect friction, the answer would be C.", "C"),
        ("The answer would be C.", "C"),
        ("<answer>C</answer>", "C"),
        ("<answer>\n(C)\n</answer>", "C"),
        ("<answer>C. photon</answer>\nOption A is wrong.", "C"),
        ("The answer is A.\n<answer>B</answer> No: <answer>The answer is C.</answer>", "C"),
        (r"<answer>\boxed{C}</answer>", "C"),
        ("The answer is C. <answer>A or B</answer>", None),
        ("Put it in <answer> tags. The answer is C.", "C"),
    ],
)
def test_the_last_statement_is_the_choice(completion, letter):
    assert choose(completion, "C") == (float(letter == "C"), letter)


@pytest.mark.parametrize("letter", LETTERS)
@pytest.mark.parametrize(
    "completion",
    [
        "The answer is {}.",
        "Answer: {}",
        "I choose {}",
        "I pick {} — it fits.",
        "**Answer: {}**",
        "The correct option is {}.",
        "The best choice is {}",
        "The answer is **{}**: the photon",
        "So the answer is option {}",
        "My answer is {}, since the others fail.",
        "The answer is {} because of x.",
        "I would choose {}.",
        "I choose {} over J.",
        "I think the answer is {}.",
        "Answer: I think it is {}.",
        "Therefore, {}.",
        "答案是{}。",
        "<answer>{}</answer>",
    ],
)
def test_every_letter_can_be_chosen(completion, letter):
    assert choose(completion.format(letter), letter) == (1.0, letter)


@pytest.mark.parametrize(
    "completion",
    [
        "The answer I gave was wrong.",
        "Answer: I don't know.",
        "Answer: I'm not sure.",
        "The answer is, I think, a train.",
        "It is I who did it.",
        "Is the answer I?",
        "I must be right.",
        "The answer is I.e. nothing.",
        "The answer is I and II.",
        "The answer: I, II and IV are true.",
        "The answer is I = 5.",
    ],
)
def test_the_pronoun_and_the_numeral_are_no_choice(completion):
    assert choose(completion, "I") == (0.0, None)


@pytest.mark.parametrize(
    "piece", [" ", "answer ", "it is ", "\\boxed{", "(", "*", "answer\n", "<answer>", "would be A if "]
)
def test_ten_thousand_of_anything_take_no_time(piece):
    started = time.perf_counter()
    assert choose("answer" + piece * 10_000 + "x", "C") == (0.0, None)
    assert time.perf_counter() - started < 5


def test_another_letter_is_wrong():
    assert choose(r"\boxed{B}", "C") == (0.0, "B")


def test_a_question_shows_its_options_with_letters():
    asked = format_choices("What?", ["this", "that"])
    assert asked.startswith("What?\n\nA. this\nB. that\n") and "\\boxed{}" in asked
    with pytest.raises(ValueError, match="11 options"):
        format_choices("What?", ["x"] * 11)
