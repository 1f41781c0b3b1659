r"""The prompts and sampler settings by which papers report, so that their figures can be compared.

    --tasks gsm8k --protocol llada      asks as LLaDA's paper does: four examples as turns of a chat, 256 tokens, ...

Each Setting names its source. Its sampler settings are defaults: flags that are given win. Accuracies are by the reader
of reasoning/answers.py; where the protocol has a simple reader of its own, the share that it finds right stands beside.
"""

import re
from typing import Callable, NamedTuple

from files import InputError
from reasoning import benchmarks


class Setting(NamedTuple):
    """How a protocol asks one benchmark."""

    published: str  # figures that were reported with it
    sampling: dict  # {argument of config.SampleArguments: value}
    prompts: Callable | None = None  # --data_dir -> function that makes a row's prompt; None: the benchmark's own
    opening: str = ""  # text that the response is made to begin with
    tokens_per_pass: int = 1
    example_tokens: int = 0  # about so many before each question, for plan.py
    reads_right: Callable | None = None  # (response, gold) -> whether the protocol's own reader finds it right


# --- LLaDA (arXiv 2502.09992) and LLaDA 1.5 (arXiv 2505.19223): OpenCompass, as EVAL.md of ML-GSAI/LLaDA says ---

TRAINING = benchmarks.Benchmark(
    files=("gsm8k/train.jsonl", "train.jsonl"),
    hub=("openai/gsm8k", "main", "train"),
    ask=benchmarks.ask_gsm8k,
    kind="number",
)
EXAMPLES = (  # how the questions of the four examples begin, in their order: OpenCompass's gsm8k_gen_1d7fe4.py
    "Angelo and Melanie want to plan",
    "Mark's basketball team scores 25 2 pointers",
    "Bella has two times as many marbles",
    "A group of 4 fruit baskets",
)


def with_four_examples(data_dir):
    """GSM8K's questions after four examples of its training set, each a turn of the user and one of the assistant."""
    place, rows = benchmarks.rows_of("gsm8k's training set", TRAINING, data_dir)
    turns = []
    for beginning in EXAMPLES:
        row = next((row for row in rows if str(row.get("question")).startswith(beginning)), None)
        if row is None:
            raise InputError(f"{place}: no question begins with {beginning!r}; expected GSM8K's training set")
        turns += [user(question_of(row)), {"role": "assistant", "content": worked(row["answer"])}]
    return lambda row: [*turns, user(question_of(row))]


def user(text):
    return {"role": "user", "content": text}


def question_of(row):
    return f"Question: {row['question']}\nLet's think step by step\nAnswer:"


def worked(answer):
    """A solution of GSM8K without its calculator's marks, its end in words."""
    return re.sub(r"<<[^<>]*>>", "", answer).replace("#### ", "The answer is ") + "\n"


def last_number_is(response, gold):
    """OpenCompass's gsm8k_postprocess: the last number before a further question; 1,234 reads as 234."""
    numbers = re.findall(r"-?\d+\.\d+|-?\d+", response.split("Question:")[0])
    return bool(numbers) and abs(float(numbers[-1]) - float(gold)) < 1e-6


def boxed_at_the_end(data_dir):
    """MATH's problems, zero-shot: OpenCompass's math_0shot_gen_11c4b5.py."""
    return lambda row: f"{row['problem']}\nPlease reason step by step, and put your final answer within \\boxed{{}}."


# --- d1 (arXiv 2504.12216): eval/ of dllm-reasoning/d1 ---

D1 = (
    "You are a math expert. You will be given a question to solve. Solve it step by step. Wrap the final answer in a "
    "\\boxed{}. \nRespond in the following format:\n<reasoning>\nYour reasoning here\n</reasoning>\n<answer>\n"
    "\\boxed{...}\n</answer>"
)


def after_d1s_instruction(data_dir):
    """A question after d1's instruction; that of MATH differs in white space, and has a quotation mark at its end."""
    math = D1.replace("{}. \n", "{}.\n") + '" \n'
    return lambda row: f"{D1}\n\n{row['question']}" if "question" in row else f"{math}\n\n{row['problem']}"


def first_box_is(response, gold):
    """d1's reader: the first box with a number (1,234 reads as 1), else the last number in <answer>."""
    for box in re.findall(r"\\boxed{(.*?)}", response):
        if numbers := numbers_in(box.strip()):
            return numbers[0] == float(gold)
    found = re.search(r"<answer>(.*?)</answer>", response, re.DOTALL)
    numbers = numbers_in(found[1].strip()) if found else []
    return bool(numbers) and numbers[-1] == float(gold)


def numbers_in(text):
    """The number that a text is, else those in it."""
    try:
        return [float(text)]
    except ValueError:
        return [float(number) for number in re.findall(r"-?\d+\.?\d*", text)]


# --- all of them ---

D1S_LENGTHS = {"gen_length": 256, "block_length": 32}
OF_500 = "of MATH's 5000 test problems, of which these are 500"
LLADA = {"prompts": with_four_examples, "example_tokens": 1400, "reads_right": last_number_is}  # 4640 characters
D1S = {"opening": "<reasoning>", "tokens_per_pass": 2}
PROTOCOLS = {
    "llada": {
        "gsm8k": Setting(
            "LLaDA-8B-Instruct 78.6, with OpenCompass 78.9", {"gen_length": 256, "block_length": 8}, **LLADA
        ),
        "math500": Setting(
            f"LLaDA-8B-Instruct 42.2, with OpenCompass 42.7; {OF_500}",
            {"gen_length": 512, "block_length": 64},
            boxed_at_the_end,
        ),
    },
    "llada-1.5": {
        "gsm8k": Setting(
            "LLaDA 1.5 83.8, with OpenCompass 83.6",
            {"gen_length": 256, "block_length": 16, "confidence_eos_eot_inf": True},
            **LLADA,
        ),
        "math500": Setting(
            f"LLaDA 1.5 42.6, with OpenCompass 42.3; {OF_500}",
            {"gen_length": 1024, "block_length": 128, "confidence_eos_eot_inf": True},
            boxed_at_the_end,
        ),
    },
    "d1": {
        "gsm8k": Setting(
            "LLaDA-8B-Instruct 78.2 with --gen_length 512",
            D1S_LENGTHS,
            after_d1s_instruction,
            reads_right=first_box_is,
            **D1S,
        ),
        "math500": Setting("LLaDA-8B-Instruct 36.2 with --gen_length 512", D1S_LENGTHS, after_d1s_instruction, **D1S),
        "countdown": Setting("LLaDA-8B-Instruct 19.5; with --gen_length 128 and 512 20.7 and 16.0", D1S_LENGTHS, **D1S),
        "sudoku": Setting(
            "LLaDA-8B-Instruct 6.7 of the cells of 256 puzzles; with --gen_length 128 and 512 11.7 and 5.5",
            D1S_LENGTHS,
            **D1S,
        ),
    },
}


def setting(protocol, task):
    """The Setting of a task under --protocol; None without one. InputError where the protocol has no such task."""
    if protocol is None:
        return None
    if task not in PROTOCOLS[protocol]:
        raise InputError(
            f"--protocol {protocol}: says nothing of {task}; it has {', '.join(PROTOCOLS[protocol])}: give them as "
            "--tasks, or leave --protocol out"
        )
    return PROTOCOLS[protocol][task]


def flags(setting):
    """The sampler settings of a Setting as a command line."""
    return [f"--{name}={value}" for name, value in setting.sampling.items()]


def fill_in(sample, setting):
    """Set the passes per response that a Setting asks for, in place, where nothing else says how many."""
    if setting.tokens_per_pass > 1 and sample.steps is None and sample.threshold is None:
        sample.steps = sample.gen_length // setting.tokens_per_pass
