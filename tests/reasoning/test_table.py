"""Tests of the printed table: what stands in it, and that it is at most 120 columns wide.

bash tests/run.sh tests/reasoning/test_table.py
"""

import re

from reasoning import comparison, table


def row(item, correct, **more):
    extracted = None if correct is None else "18" if correct else "20"
    return {"id": str(item), "extracted": extracted, "correct": correct, "ended": True, "tokens": 100, **more}


def lines(first, other, **more):
    """The table's lines of two models' rows on gsm8k."""
    about = {"sampler": "--gen_length 256 --block_length 8 --steps 256 --temperature 1.0", "protocol": None} | more
    origins = {"base": "GSAI-ML/LLaDA-8B-Instruct", "adapter": "runs/llada_8b_lora_4080/final"}
    own = comparison.summary("gsm8k", "llada_8b_lora_4080-final", first, None) | about | origins
    others = comparison.summary("gsm8k", "GSAI-ML-LLaDA-8B-Instruct", other, first) | about | origins
    return [own, others | {"adapter": None}]


def printed(capsys, made):
    table.print_table(made)
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 120
    return said


def test_one_response_per_item(capsys):
    first = [row(item, item % 4 != 0, by_protocol=True) for item in range(40)]
    other = [row(item, None if item == 0 else item % 3 != 0, by_protocol=False) for item in range(40)]
    said = printed(capsys, lines(first, other, protocol="llada"))
    assert said.startswith("gsm8k by the protocol llada: 40 items\nmodel ")
    assert re.search(r"\nllada_8b_lora_4080-final +0.750    0.598-0.858      0%   100%   100.0\n", said)
    assert "base GSAI-ML/LLaDA-8B-Instruct, adapter runs/llada_8b_lora_4080/final; --gen_length 256" in said
    assert "llada_8b_lora_4080-final against it: +0.100 (10 won, 6 lost, p = 0.45)" in said
    assert "with 40 items of which 40% change sides (16), 13 to 3 (+25.0 points) is the least gain" in said
    assert said.count("by the protocol's own reader") == 2 and "pass@" not in said


def test_several_responses_per_item_and_parts(capsys):
    """Even items: two of four samples are right and agree, after a wrong one; odd ones: the one right is outvoted.

    The other model is right in the first sample of even items alone, which is outvoted.
    """
    verdicts = {0: (False, True, True, None), 1: (False, False, True, None)}
    votes = {0: (0, 1, 1, None), 1: (0, 0, 2, None)}
    first = [
        row(item, verdicts[item % 2][j], sample=j, vote=votes[item % 2][j], level=item % 2 + 1, subject="Algebra")
        for item in range(20)
        for j in range(4)
    ]
    other = [each | {"correct": each["level"] == 1 and each["sample"] == 0} for each in first]
    made = lines(first, other)
    assert made[0]["accuracy"] == 0.375 and made[0]["majority"]["value"] == 0.5 and made[0]["unread"] == 0.25
    assert {k: each["value"] for k, each in made[0]["pass_at"].items()} == {
        "1": 0.375,
        "2": (5 / 6 + 1 / 2) / 2,
        "4": 1.0,
    }
    assert made[0]["by"]["level"]["1"] | {"ci95": None} == {"n": 10, "accuracy": 0.5, "ci95": None}
    assert made[0]["by"]["subject"]["Algebra"]["n"] == 20 and made[0]["by"]["level"]["2"]["accuracy"] == 0.25
    assert made[1]["first_model_against_it"]["pass@1"]["value"] == 0.375 - 0.125
    assert (made[1]["first_model_against_it"]["won"], made[1]["first_model_against_it"]["lost"]) == (10, 0)
    said = printed(capsys, made)
    assert said.startswith("gsm8k: 20 items, 4 samples each\n")
    for words in ("  pass@2 ", "  pass@4 ", "  majority@4 ", "  level 2 (n = 10) ", "  subject Algebra (n = 20) "):
        assert said.count(words) == 2
    assert "against it, pass@1: +0.250 (95% interval +0." in said and "against it, majority@4: +0.500 (10 won" in said


def test_a_task_without_items_and_a_model_alone(capsys):
    alone = lines([row(item, True) for item in range(200)], [])[:1]
    empty = {"task": "logiqa", "model": "a", "n": 0}
    said = printed(capsys, [*alone, empty])
    assert said.endswith("\nlogiqa: 0 items\n")
    assert "  to compare models: with 200 items of which 15% change sides (30), 21 to 9 (+6.0 points) is the" in said
