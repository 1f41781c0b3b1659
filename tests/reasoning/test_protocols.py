r"""Tests of protocols.py: the prompts of LLaDA and d1, their readers, and that given flags win over their settings.

bash tests/run.sh tests/reasoning/test_protocols.py
"""

import json

import pytest
from small import flags

import evaluate
from files import InputError
from reasoning import benchmarks, protocols
from reasoning.arguments import check

QUESTIONS = (
    "Bella has two times as many marbles as frisbees?",
    "Tom has 2 hats?",
    "A group of 4 fruit baskets contains 9 apples?",
    "Mark's basketball team scores 25 2 pointers, 8 3 pointers?",
    "Angelo and Melanie want to plan how many hours?",
)


@pytest.fixture
def gsm8k(tmp_path):
    """A folder with a training set of five questions and a test set of one."""
    rows = [
        {"question": question, "answer": f"So 3*{number} = <<3*{number}=6>>6 of 1,000\nDone.\n#### {number}"}
        for number, question in enumerate(QUESTIONS)
    ]
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "gsm8k" / "test.jsonl").write_text('{"question": "How many?", "answer": "1+1=<<1+1=2>>2\\n#### 2"}\n')
    return tmp_path


def prompt_of(protocol, task, data_dir):
    prompt = protocols.PROTOCOLS[protocol][task].prompts(data_dir)
    return benchmarks.read(task, data_dir, prompt)[0].prompt


def test_llada_asks_after_four_examples_in_its_order(gsm8k):
    messages = prompt_of("llada", "gsm8k", gsm8k)
    assert [each["role"] for each in messages] == ["user", "assistant"] * 4 + ["user"]
    for message, number in zip(messages[:-1:2], (4, 3, 0, 2)):
        assert message["content"] == f"Question: {QUESTIONS[number]}\nLet's think step by step\nAnswer:"
    assert messages[1]["content"] == "So 3*4 = 6 of 1,000\nDone.\nThe answer is 4\n"
    assert messages[-1]["content"] == "Question: How many?\nLet's think step by step\nAnswer:"
    assert prompt_of("llada-1.5", "gsm8k", gsm8k) == messages


def test_the_four_examples_are_in_gsm8k(shared):
    messages = prompt_of("llada", "gsm8k", shared)
    ends = [message["content"].splitlines()[-1] for message in messages[1::2]]
    assert ends == [f"The answer is {number}" for number in (4, 201, 140, 146)]
    assert not any("<<" in message["content"] or "#" in message["content"] for message in messages)
    assert "3 hours x 2 chapters = 6 hours total.\n" in messages[1]["content"]


def test_another_training_set_is_refused(gsm8k):
    path = gsm8k / "gsm8k" / "train.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(InputError, match="no question begins with 'Bella has two times as many marbles'"):
        prompt_of("llada", "gsm8k", gsm8k)


def test_d1_and_math(tmp_path):
    (tmp_path / "test.jsonl").write_text('{"problem": "2x?", "answer": "4", "level": 3, "subject": "Algebra"}\n')
    instruction, problem = prompt_of("d1", "math500", tmp_path).rsplit("\n\n", 1)
    assert problem == "2x?" and instruction.startswith("You are a math expert.") and "\\boxed{...}" in instruction
    assert protocols.PROTOCOLS["d1"]["math500"].opening == "<reasoning>"
    [item] = benchmarks.read("math500", tmp_path)
    assert item.groups == {"level": 3, "subject": "Algebra"}
    asked = "2x?\nPlease reason step by step, and put your final answer within \\boxed{}."
    assert prompt_of("llada", "math500", tmp_path) == asked


@pytest.mark.parametrize(
    "reader, response, gold, right",
    [
        (protocols.last_number_is, "It is 3.\nThe answer is 18.0 dollars", "18", True),
        (protocols.last_number_is, "The answer is 18\n\nQuestion: and 5?\nAnswer: 5", "18", True),
        (protocols.last_number_is, "The answer is 1,234", "1234", False),  # OpenCompass reads 234
        (protocols.last_number_is, "The answer is 18, or 20", "18", False),
        (protocols.last_number_is, "no idea", "18", False),
        (protocols.first_box_is, r"\boxed{...} so \boxed{18}. No, \boxed{20}", "18", True),
        (protocols.first_box_is, r"\boxed{18 dollars or 20}", "18", True),
        (protocols.first_box_is, r"\boxed{1,234}", "1234", False),  # d1 reads 1
        (protocols.first_box_is, "<answer>\n5 + 13 = 18\n</answer>", "18", True),
        (protocols.first_box_is, "<answer>18", "18", False),
        (protocols.first_box_is, "18", "18", False),
    ],
)
def test_their_own_readers(reader, response, gold, right):
    assert reader(response, gold) is right


def sampled(protocol, task, *argv):
    """The SampleArguments by which a task is asked."""
    argv = ["--device", "cpu", "--protocol", protocol, *map(str, argv)]
    sample = evaluate.sampling_of(argv, protocols.setting(protocol, task))
    check(sample)
    return sample.gen_length, sample.block_length, sample.steps, sample.confidence_eos_eot_inf


def test_settings_and_flags_that_win(tmp_path):
    assert sampled("llada", "gsm8k") == (256, 8, 256, False)
    assert sampled("llada-1.5", "gsm8k") == (256, 16, 256, True)
    assert sampled("llada-1.5", "math500") == (1024, 128, 1024, True)
    assert sampled("d1", "gsm8k") == (256, 32, 128, False)
    assert sampled("d1", "gsm8k", *flags(gen_length=512)) == (512, 32, 256, False)
    assert sampled("d1", "gsm8k", *flags(gen_length=64, steps=64)) == (
        64,
        32,
        64,
        False,
    )  # 64 is the default, and given
    assert sampled("d1", "gsm8k", *flags(threshold=0.9)) == (256, 32, None, False)
    (tmp_path / "run.yaml").write_text("gen_length: 128\n")
    assert sampled("llada", "gsm8k", *flags(config_file=tmp_path / "run.yaml", block_length=16))[:2] == (128, 16)
