r"""Tests of answers.py: spellings of numbers, times, letters, words and expressions; what cannot be read.

bash tests/run.sh tests/reasoning/test_answers.py
"""

import time

import pytest

from reasoning import answers, marks
from reasoning.answers import Gold, gold, grade, read

# --- numbers: (response, answer) ---

MARKED = [
    ("3 + 4 = 7\n#### 7", "7"),
    ("####7", "7"),
    ("####\t \t8  pens", "8"),
    ("####\n8", "8"),
    ("####  8  \n", "8"),
    ("#### 8.", "8"),
    ("#### -3", "-3"),
    ("#### - 3", "-3"),
    ("#### -$3", "-3"),
    ("#### $-3.", "-3"),
    ("#### **18**", "18"),
    ("#### `18`", "18"),
    ("#### $1,200.50.", "1200.5"),
    ("#### 1,234,567", "1234567"),
    ("#### 8 pens a day", "8"),
    ("#### 50%", "50"),
    ("#### 007", "7"),
    ("#### -0.0", "0"),
    ("#### .5", "0.5"),
    ("#### 1/2", "1/2"),
    ("#### 1 1/2", "3/2"),
    ("#### 3\nno\n#### 4\nor 5", "4"),
    ("#### 3\n5 + 5 = 10", "3"),
    ("#### 3 #### +", "3"),
    ("#### $12/hour", "12"),
    ("#### 18 - the total earned", "18"),
    ("#### 18 (eighteen)", "18"),
    ("#### 18, because she sells 9", "18"),
    ("#### The total is 18 dollars", "18"),
    ("#### 5*3 = 15", "15"),
    ("#### USD 18", "18"),
    ("#### 18<|eot_id|>", "18"),
    ("#### 1.5 million", "1500000"),
    ("#### 70k", "70000"),
    ("#### 1.5e3", "1500"),
    ("#### 15e-1", "1.5"),
    ("#### 18####", "18"),
    ("#### 18\n#### Explanation: 9 + 9", "18"),
    ("#### 18\n#### Note: there are 2", "18"),
    ("#### 18\n#### Each of the 9 costs 2", "18"),
    ("#### 18\n#### 18\n####", "18"),
    ("#### Final Answer\n\\boxed{18}", "18"),
    ("#### Step 1: the cost\n5\n#### Step 2: the profit\n\nThe profit is \\boxed{70000}.", "70000"),
    ("<answer>\n130 dollars\n</answer>", "130"),
    ("<answer>\nboxed{5}\n</answer>", "5"),  # LLaDA loses backslashes
    ("is 145 minutes\n<answer>\n\\boxed{145\n</answer>", "145"),  # and braces
]
SPELLINGS = [  # the same number, as models spell it after ####, in a box, or said
    ("18", ["18", r"\$18", r"\(18\)", "$18$", r"\[18\]", "(18)", "x = 18", r"x_1 = 18", r"\text{Total} = 18"]),
    ("18", ["\uff11\uff18", "\u20ac18", "18 USD", r"18\%", r"18^\circ", r"18^{\circ}", r"18 \text{ cm}"]),
    ("18", [r"\text{18}", r"\mathbf{18}", r"\text{18 eggs}", "18:00", "18 = x"]),
    ("18", ["= 18", r"\approx 18", r"\frac{36}{2} = 18", r"2 \times 9 = 18"]),
    ("-18", ["minus 18", "negative 18", "-18", "\u221218", "\u201318", r"\(-18\)", "-$18", "$-18", "x = \u221218"]),
    ("1234", ["1,234", r"1\,234", "1{,}234", r"1,\!234", r"1\ 234", "1 234", "1\u202f234", "1\u00a0234", "1234.00"]),
    ("1234567", [r"1\,234\,567", "1,234,567", "1 234 567"]),
    ("7/2", ["3\u00bd", "3 \u00bd"]),
    ("3/4", ["\u00be", r"\frac{3}{4}", r"\dfrac34", "3/4", r"x = \tfrac{3}{4}"]),
    ("1500", [r"1.5\times10^{3}", r"1.5 \cdot 10^3", "1.5 thousand"]),
]
UNMARKED = [
    ("The answer is 12.", "12"),
    ("The answer is 20. Wait, that is wrong. The final answer is 18.", "18"),
    ("**Answer:** 18", "18"),
    ("Final answer:\n18", "18"),
    ("The answer to the question is $18.", "18"),
    ("The answer is 18 dollars, since x = 9.", "18"),
    ("Answer: 16-3-4 = 9, 9*2 = 18 dollars", "18"),
    ("3 - 1 = 2", "2"),
    ("it is -5", "-5"),
    ("8 m2", "8"),
    ("24/6", "24/6"),
    ("A: 65960", "65960"),
    ("18\n\nExplanation: there are 2 ducks.", "18"),
    ("She makes $18.\nThat is her income.", "18"),
    ("1,234,567.00 in all.", "1234567"),
    ("at 12:00.", "12"),
]
RUN_ON = [  # the first answer counts
    "so 18\n#### 18\n\nQuestion: Tom has 2.\nAnswer: 2+3=5\n#### 5",
    "#### 18\nQuestion: Tom has 2.\n#### 5",
    "#### 18\nQ: Tom?\nA: 5",
    "#### 18\n\n**Problem 2:** Tom has 2.\n\\boxed{5}",
    "#### 18\n\nTom has 5 apples. He eats 2. How many are left?\n5 - 2 = 3\n#### 3",
    "\\boxed{18}\n\nTom has 5 apples. How many are left?\n\\boxed{3}",
    "The answer is 18.\n\nQ: Tom has 2.\nA: The answer is 5.",
    "The answer is 18. Tom has 5, how many are left? The answer is 5.",
    "so 3*6 = 18.\n\nQuestion: Tom has 2. Answer: 2+3=5\n#### 5",
    "<answer>18</answer>\nWhat next?\n<answer>5</answer>",
    "#### 18 eggs.\n\nHuman: thanks, and 5?",
    "#### 18\n\nCalculate 2 + 3.\n#### 5",
    "#### 18\n\nQ2. Tom has 2.\n#### 5",
    "Question: Janet has eggs.\nAnswer: 2 * 9\n#### 18",  # its own question, said again
]
UNREADABLE = [
    "",
    "none",
    "9 of them\n####",
    "#### nine",
    "#### 5 + 3",
    "#### 18\u00b2",
    "So it is 18\u00b2.",
    "#### 2**3",
    "#### 8 5",
    "#### 18 or 20",
    "#### 18, 20",
    "#### 18,5",
    "#### 1.234.567",
    "#### 10-15",
    "#### x = 3, y = 4",
    "#### x = 3 and y = 4",
    "#### Step 1: the cost",
    "#### 2x",
    "#### 8x1",
    "#### 5 hours and 30 minutes",
    "#### 5 feet 6 inches",
    r"\boxed{}",
    r"\boxed{...}",
    r"\boxed{3\sqrt{2}}",
    r"\boxed{18",
    "12 - 4",
    " 7 + 5 = 12\n12 - 4 =",
    "Therefore she makes 18 dollars in 2 days.",
    "The answer is 3 or 4.",
    "<think>\n#### 8",
]


@pytest.mark.parametrize("text, number", MARKED + UNMARKED)
def test_numbers(text, number):
    assert read("number", text) == number


@pytest.mark.parametrize("number, spellings", SPELLINGS)
def test_spellings_of_one_number(number, spellings):
    """In every place; each is right for its number, and wrong for another."""
    for spelling in spellings:
        for text in ("#### {}", "so\n#### {}\n", "\\[ \\boxed{{{}}} \\]", "<answer>{}</answer>", "The answer is {}."):
            response = text.format(spelling)
            assert grade("number", number, response)["correct"] is True, response
            assert grade("number", "7", response)["correct"] is False, response


@pytest.mark.parametrize("text", RUN_ON)
def test_the_first_answer_counts_where_a_model_runs_on(text):
    assert read("number", text) == "18"


@pytest.mark.parametrize("text", UNREADABLE)
def test_unreadable_is_neither_right_nor_wrong(text):
    assert grade("number", "18", text) == {"extracted": None, "correct": None}


def test_numbers_are_equal_by_value():
    assert grade("number", "4", "#### 24/6")["correct"] and grade("number", "0.5", r"\boxed{\frac{1}{2}}")["correct"]
    assert grade("number", "18", "<think>\n#### 3\n</think>\n\nIt is 18.")["correct"]


@pytest.mark.parametrize("text", ["####" + " " * 20_000 + "\\boxed", "9" * 20_000, "\n" * 20_000, "answer " * 5_000])
def test_long_texts_take_no_time(text):
    start = time.perf_counter()
    assert read("number", text) is None and time.perf_counter() - start < 1


# --- letters ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, name",
    [
        ("A: not implied.\nB: contradicts it.\nC: follows.\nD: irrelevant.\n\nSo the right option is C.", "C"),
        ("A. Not supported.\nB. Neither.\nC. Supported.\nD. No.\n\nTherefore, C is the correct answer.", "C"),
        ("Option A: wrong.\nOption B: right.\nTherefore, the best choice is B.", "B"),
        ("(A) is wrong.\n(B) wrong.\n(C) right.\nTherefore (C) is it", "C"),
        ("A. Some\nB. Others\nneither of them", None),
        ("The answer is A or B", None),
        ("A or B", None),
        ("B and C.", None),
        ("It is hard.\nSo it is A, or B", None),
        ("The answer is either A or B.", None),
        ("The answer is A, B, and C.", None),
        ("The answer is C - only it follows", "C"),
        ("The answer is 'C'.", "C"),
        ("The answer is \u201cC\u201d.", "C"),
        (r"The answer is \(C\).", "C"),
        ("Therefore, option C is correct.", "C"),
        ("[C]", "C"),
        ("C!", "C"),
        ("<answer>C</answer>", "C"),
        ("None of A, B, C fit.", None),
        ("The answer is C, and A is wrong.", "C"),
        ("The answer is (A) or (B).", None),
        ("The answer is C", "C"),
        ("The answer is (C).", "C"),
        ("answer: B", "B"),
        ("the answer is **D**", "D"),
        ('Answer is "B"', "B"),
        (r"the answer is $\boxed{B}$", "B"),
        ("The answer is\nD", "D"),
        ("So the answer is option B.", "B"),
        ("The answer is A because", "A"),
        ("The answer is D. No: the answer is B.", "B"),
        (r"\boxed{C}", "C"),
        (r"\boxed{\text{C}}", "C"),
        (r"A or B? \boxed{(A)}", "A"),
        ("C", "C"),
        ("C.", "C"),
        ("(B) Some young", "B"),
        ("A. Some", "A"),
        ("Option D", "D"),
        ("I think it is C", "C"),
        ("So\nB", "B"),
        ("A teacher.\nSo the best is (D)", "D"),
        ("A or (B)\n(B) and (C)", None),
        ("The answer is A teacher", None),
        ("A teacher is here", None),
        ("answer is Dogs", None),
        ("Because", None),
        ("It's D'Artagnan", None),
        ("", None),
        ("#### (B)", "B"),
        ("#### B. Paris", "B"),
        (r"#### \(B\)", "B"),
        ("B) 18", "B"),
        ("#### B\n\nQuestion: Why?\n#### C", "B"),
        ("#### A or B", None),
        ("#### 18", None),
        ("H", "H"),
        ("I, too, think so.", None),
    ],
)
def test_letters(text, name):
    assert read("letter", text) == name


# --- times and words --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "right, text, verdict",
    [
        ("9:35", "#### 09:35.", True),
        ("9:35", "It ends at 9:35.", True),
        ("9:35", "#### 9:40", False),
        ("9:35", "#### 9:35 pm", None),  # nobody said which half of the day
        ("9:35 pm", "#### 21:35", True),
        ("9:35", "#### 9:35 or 10:35", None),
        ("9:35", "#### 9:3", None),
        ("9:35", "#### 9:351", None),
        ("Mia", "#### Mia.\nQuestion: who?\n#### Ann", True),
        ("Mia", "#### **mia**!", True),
        ("Mia", r"\boxed{\text{Mia}}", True),
        ("Mia", "So the answer is Mia.", True),
        ("Mia", "Mia", True),
        ("Mia", "#### Ann", False),
        ("Mia", "#### Mia is the oldest", None),
        ("Mia", "The oldest is Mia.", None),
        ("Mia", "Ann is older.\nBo is not.", None),
        ("Mia", "####", None),
        ("the red box", "#### red Box", True),
        ("O'Neil", "#### O'Neil", True),
        ("yes", "#### no", False),
        ("yes", "Yes, they are.", True),
        ("yes", "No, they are not.", False),
        ("yes", "#### Yes and no.", None),
        ("no", "#### It depends.", None),
        ("True", "#### Yes", True),  # a row may have true as its answer
        ("True", "No, they are not.", False),
        ("True", "The answer is true.", True),
    ],
)
def test_times_and_words(right, text, verdict):
    assert grade(*gold(right), text)["correct"] is verdict


# --- expressions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "right, text, verdict",
    [
        (r"\sqrt{2}", r"\boxed{\sqrt 2}", True),
        (r"\sqrt{2}", r"#### $\sqrt{2}$", True),
        (r"\sqrt{2}", r"The answer is \(\sqrt{2}\).", True),
        (r"\sqrt{2}", r"\boxed{x = \sqrt{2}}", True),
        (r"\sqrt{2}", r"\boxed{\sqrt{3}}", False),
        (r"\sqrt{2}", r"\boxed{\frac{}", None),
        (r"\sqrt{2}", "no idea at all", None),
        (r"\sqrt{2}", r"\boxed{\sqrt{}}", None),
        ("x^2-1", "$(x-1)(x+1)$", True),
        ("(3, 4)", r"\boxed{(3,4)}", True),
        ("2x", r"\boxed{}", None),
    ],
)
def test_expressions(right, text, verdict):
    pytest.importorskip("math_verify")
    assert gold(right).kind == "expression" and grade(*gold(right), text)["correct"] is verdict


def test_a_number_among_expressions_is_read_as_a_number():
    """MATH's items, compared as expressions without math-verify where both are numbers."""
    for text in (r"\boxed{\$18}", r"\boxed{18\text{ eggs}}", "#### 18 dollars", r"#### \(18\)"):
        assert grade("expression", "18", text)["correct"] is True
    assert grade("expression", r"11,\! 111,\! 100", r"\boxed{11111100}")["correct"] is True


# --- gold answers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        ("8", ("number", "8")),
        ("$1,200", ("number", "1200")),
        ("18 dollars", ("number", "18")),
        ("so 4 + 4 = 8\n#### 8", ("number", "8")),
        ("4 + 4 = 8.\nThe answer is 8.", ("number", "8")),
        (r"so it is \boxed{\frac{1}{2}}.", ("number", "1/2")),
        ("(B)", ("letter", "B")),
        ("B. Paris", ("letter", "B")),
        ("No, she is not.", ("words", "No")),
        ("No Country for Old Men", ("words", "No Country for Old Men")),
        (r"\text{(B)}", ("letter", "B")),
        ("09:35", ("time", "9:35")),
        ("Mia", ("words", "Mia")),
        (r"\text{Evelyn}", ("words", "Evelyn")),
        ("3 Doors Down", ("words", "3 Doors Down")),
        ("World War 2", ("words", "World War 2")),
        ("True", ("words", "True")),
        ("7 + 1", ("expression", "7 + 1")),
        ("2x", ("expression", "2x")),
        (r"\frac{1}{3}x", ("expression", r"\frac{1}{3}x")),
        ("", None),
        ("####", None),
        ("+", None),
        ("two\nlines", None),
        ("one two three four five six seven eight nine ten eleven", None),
    ],
)
def test_gold(text, expected):
    assert gold(text) == (expected and Gold(*expected))


@pytest.mark.parametrize(
    "text, inside",
    [
        (r"\boxed{3}", "3"),
        (r"\boxed{\frac{1}{2}} then \boxed{ \sqrt{2} }.", r"\sqrt{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\fbox{x}", "x"),
        (r"$\boxed 5$", "5"),
        (r"\boxed{}", ""),
        (r"\boxed{a{b}c", None),
        (r"\boxed{a} \boxed{b", None),
        ("5", None),
        ("", None),
    ],
)
def test_boxed(text, inside):
    assert marks.boxed(text) == inside


def test_every_kind_reads_nothing_from_nothing():
    assert {answers.read(kind, " \n ") for kind in answers.KINDS} == {None}
