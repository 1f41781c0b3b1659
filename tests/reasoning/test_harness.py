"""Tests of lm_eval's adapter: by itself, against the sampler and the score; lm_eval's own gsm8k and logiqa, unmodified.

bash tests/run.sh tests/reasoning/test_harness.py        # those of lm_eval are skipped without requirements-eval.txt
"""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import new_tiny
import pytest
import torch
from small import ENV, ROOT, call, flags, refusal, run

import config
import evaluate
from files import InputError
from models import tokenization
from reasoning import arguments, harness, sampler, tasks
from reasoning.prompts import prompt_ids
from scoring import noise

TINY = ROOT / "examples" / "tiny"
UNTIL = ["Question:", "</s>", "<|im_end|>"]  # gsm8k.yaml's
needs_lm_eval = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="no lm_eval: pip install -r requirements-eval.txt"
)


def lm(model=TINY, **values):
    """Our model as lm_eval makes it: --model_args, gen_length=24 and block_length=8 among them."""
    values = {"use_mixed_precision": "no", "device": "cpu", "gen_length": 24, "block_length": 8} | values
    return evaluate.LanguageModel.create_from_arg_obj({"pretrained": str(model), **values}, {"batch_size": 4})


@pytest.fixture(scope="module")
def tiny():
    return lm()


def request(*args):
    return SimpleNamespace(args=args)


def problems(n):
    return tasks.generate(n, "test", 11)


# --- text -------------------------------------------------------------------------------------------------


def test_text_is_the_samplers(tiny):
    """Requests with two sets of options, mixed: each gets the sampler's text for its options, in its own place."""
    prompts = [problem.prompt for problem in problems(6)]
    requests = [
        request(prompt, {"until": UNTIL, "do_sample": False, **({"max_gen_toks": 16} if index % 2 else {})})
        for index, prompt in enumerate(prompts)
    ]
    texts = tiny.generate_until(requests, disable_tqdm=True)
    for index, prompt in enumerate(prompts):
        sample = config.SampleArguments(
            model_name_or_path=str(TINY),
            use_mixed_precision="no",
            device="cpu",
            gen_length=16 if index % 2 else 24,
            block_length=8,
        )
        arguments.check(sample)
        ids = prompt_ids(tiny.tokenizer, {"prompt": prompt}, "here", "none")
        assert texts[index] == sampler.respond(tiny.model, tiny.tokenizer, [ids], sample)[0].text
    assert len(set(texts)) > 3 and any("####" in text for text in texts)


def test_text_ends_before_the_stop_string(tiny):
    [whole] = tiny.generate_until([request(problems(1)[0].prompt, {"until": []})], disable_tqdm=True)
    for until in (["####", "never"], ["never", "####"], "####"):
        assert tiny.generate_until([request(problems(1)[0].prompt, {"until": until})], disable_tqdm=True) == [
            whole[: whole.index("####")]
        ]


def test_a_thought_is_neither_an_answer_nor_cut_at_a_stop_string(tiny, monkeypatch):
    reply = sampler.Response("<think>\n\n</think>\n\n12\n\nQuestion:", 9, True)
    monkeypatch.setattr(sampler, "respond", lambda *_, finished, **__: finished({0: reply}))
    assert tiny.generate_until([request("x", {"until": ["\n\n"]})], disable_tqdm=True) == ["12"]


@pytest.mark.parametrize(
    "text, until, cut",
    [
        ("a b c", ["c", "b"], "a "),
        ("a b c", ["x"], "a b c"),
        ("a b c", [""], "a b c"),
        ("a", ["a"], ""),
        ("a", [], "a"),
    ],
)
def test_cut(text, until, cut):
    assert harness.cut(text, until) == cut


@pytest.mark.parametrize(
    "ours, options, wanted",
    [
        ({}, {}, (24, 8, 24)),
        ({}, {"max_gen_toks": 40}, (40, 8, 40)),
        ({}, {"max_new_tokens": 30}, (24, 8, 24)),  # whole blocks, at most what is asked
        ({}, {"max_tokens": 5}, (5, 5, 5)),
        ({"steps": 12}, {"max_gen_toks": 48}, (48, 8, 24)),  # as many tokens a pass
        ({"steps": 3}, {"max_gen_toks": 8}, (8, 8, 1)),
    ],
)
def test_lengths_a_task_asks_for(ours, options, wanted):
    made = lm(**ours).sampling(options)
    assert (made.gen_length, made.block_length, made.steps) == wanted


def test_temperature_a_task_asks_for():
    model = lm(temperature=0.5)
    assert model.sampling({}).temperature == 0.5
    assert model.sampling({"temperature": 0.8, "do_sample": True}).temperature == 0.8
    assert model.sampling({"temperature": 0.8, "do_sample": False}).temperature == 0.0


def test_options_that_it_has_not_are_named(tiny, capsys):
    tiny.generate_until([request("1 + 1 =", {"until": [], "top_p": 0.9, "num_beams": 2})], disable_tqdm=True)
    assert "num_beams, top_p" in capsys.readouterr().err


# --- likelihoods ------------------------------------------------------------------------------------------


def test_likelihood_is_the_score(tiny):
    """The score of the continuation's ids, summed here one state at a time; the same at every call."""
    problem = problems(1)[0]
    [(value, says)] = tiny.loglikelihood([request(problem.prompt, problem.solution)], disable_tqdm=True)
    prompt = prompt_ids(tiny.tokenizer, {"prompt": problem.prompt}, "here", "none")
    response = tokenization.encode(tiny.response_tokenizer, problem.solution)
    T, R = 4, 5
    orders = noise.trajectories(len(response), T, R, noise.generator(0, prompt + response, "chosen"))
    total = 0.0
    for order in orders:  # (n,): the step at which each token is revealed
        for step in range(T):
            revealed, hidden = (order == step).sum(), torch.as_tensor(order >= step)
            if revealed:
                ids = torch.tensor(response).masked_fill(hidden, tiny.masking.mask_id)
                with torch.no_grad():
                    logits = tiny.model(torch.cat([torch.tensor(prompt), ids])[None]).logits[0, len(prompt) :]
                logps = logits.float().log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]
                total += float(logps[hidden].mean()) * revealed / R
    assert value == pytest.approx(total, abs=1e-3) and value < -0.1 and says is False
    assert tiny.loglikelihood([request(problem.prompt, problem.solution)], disable_tqdm=True) == [(value, False)]


def sdar(folder, block_size):
    """A new block-causal model as lm_eval reads it."""
    new_tiny.main(["--in", str(ROOT / "examples" / "prefs.jsonl"), "--out", str(folder), "--family", "sdar"])
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"block_size": block_size}))
    return lm(folder, block_length=block_size)


def test_likelihood_of_a_block_causal_model(tmp_path):
    """With blocks of one token it is that of each token after those before it, whatever the noise."""
    model, response = sdar(tmp_path / "model", 1), "7 + 5 = 12"
    [(value, _)] = model.loglikelihood([request("Answer:", response)], disable_tqdm=True)
    ids = prompt_ids(model.tokenizer, {"prompt": "Answer:"}, "here", "none")
    total = 0.0
    for token in tokenization.encode(model.response_tokenizer, response):
        seen = torch.ones(len(ids) + 1, len(ids) + 1).tril().bool()[None, None]
        with torch.no_grad():
            logits = model.model(torch.tensor([[*ids, model.masking.mask_id]]), attention_mask=seen).logits[0, -1]
        total += float(logits.log_softmax(-1)[token])
        ids.append(token)
    assert value == pytest.approx(total, abs=1e-3)


def test_lengths_of_a_block_causal_model(tmp_path):
    """A response may have any length, because its last block may be cut."""
    made = sdar(tmp_path / "model", 4).sampling({"max_gen_toks": 10})
    assert (made.gen_length, made.block_length, made.steps) == (10, 4, 10)


def test_right_solutions_are_likelier(tiny):
    pairs = [(row["prompt"], row["chosen"], row["rejected"]) for row in tasks.preference_rows(30, "test", 5)]
    values = tiny.loglikelihood(
        [request(prompt, text) for prompt, *texts in pairs for text in texts], disable_tqdm=True
    )
    assert sum(values[2 * i][0] > values[2 * i + 1][0] for i in range(30)) >= 24


def test_where_the_space_stands_does_not_matter(tiny):
    """lm_eval's contexts end without a space; a task of one's own may leave it there."""
    apart = tiny.loglikelihood(
        [request("Answer:", " 7 + 5 = 12"), request("Answer: ", "7 + 5 = 12")], disable_tqdm=True
    )
    assert apart[0] == apart[1]
    assert tiny.loglikelihood([request("Answer:", "")], disable_tqdm=True) == [(0.0, True)]


def test_greedy_is_checked_on_request():
    model, prompt = lm(check_greedy=True), problems(1)[0].prompt
    ids = prompt_ids(model.tokenizer, {"prompt": prompt}, "here", "none")
    sample = config.SampleArguments(model_name_or_path=str(TINY), use_mixed_precision="no", device="cpu", gen_length=6)
    arguments.check(sample)
    greedy = sampler.generate(model.model, torch.tensor([ids]), sample, model.masking.mask_id)[0].tolist()
    text = model.tokenizer.decode(ids + greedy)[len(model.tokenizer.decode(ids)) :]
    assert tokenization.encode(model.response_tokenizer, text) == greedy  # else the text is no fair question
    (_, same), (_, other) = model.loglikelihood(
        [request(prompt, text), request(prompt, " pens + pens")], disable_tqdm=True
    )
    assert same and not other


# --- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values, word",
    [
        ({"trajectories": 0}, "trajectories"),
        ({"diffusion_steps": 0}, "diffusion_steps"),
        ({"gen_length": 25}, "block"),
        ({"template": "auto"}, "apply_chat_template"),
        ({"no_such": 1}, "no_such"),
        ({"pretrained": "no/such"}, "no/such"),
    ],
)
def test_bad_arguments_are_refused(values, word, capsys):
    with pytest.raises((InputError, SystemExit)) as refused:
        lm(**values)
    assert word in str(refused.value) + capsys.readouterr().err


def test_rolling_and_missing_templates_are_refused(tiny):
    with pytest.raises(InputError, match="perplexity of whole documents"):
        tiny.loglikelihood_rolling([request("a")])
    with pytest.raises(InputError, match="no chat template"):
        tiny.chat_template()


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm_eval is installed")
def test_without_lm_eval_one_sentence():
    said = run([ROOT / "evaluate.py", "lm_eval", "run"], code=2)
    assert "requirements-eval.txt" in said and "Traceback" not in said


def test_help_of_the_command_line(capsys):
    """The names of --model_args, and whole commands that name evaluate.py."""
    with pytest.raises(SystemExit) as end:
        harness.main(evaluate.LanguageModel, harness.__doc__, ["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert not end.value.code and "python evaluate.py lm_eval run --model masked_diffusion" in said
    assert "--gen_length" in said and "--trajectories" in said and "--template" not in said


# --- lm_eval itself ---------------------------------------------------------------------------------------


def local_data(folder, gsm8k, logiqa):
    """Data sets as folders: lm_eval's unmodified tasks find them by their names below the working folder."""
    for name, config_name, splits in (("openai/gsm8k", "main", gsm8k), ("EleutherAI/logiqa", "logiqa", logiqa)):
        (folder / name).mkdir(parents=True)
        files = "".join(f"  - split: {split}\n    path: {split}.jsonl\n" for split in splits)
        text = f"---\nconfigs:\n- config_name: {config_name}\n  data_files:\n{files}---\n"
        (folder / name / "README.md").write_text(text)
        for split, rows in splits.items():
            (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def lm_evaluated(tmp_path_factory):
    """lm_eval's results and samples of gsm8k and logiqa, whose data are tasks.py's problems in those tasks' columns."""
    folder = tmp_path_factory.mktemp("lm_eval")
    rows = [
        {"question": problem.prompt.removeprefix("Question: ").removesuffix("\nAnswer:"), "answer": problem.solution}
        for problem in problems(30)
    ]
    choices = [
        {"label": "b", "context": "c", "question": "q", "options": ["1", problem.answer, "0", "2 2"]}
        for problem in problems(4)
    ]
    local_data(folder, {"train": rows[:6], "test": rows}, {"train": choices, "validation": choices, "test": choices})
    command = [sys.executable, ROOT / "evaluate.py", "lm_eval", "run", "--model", "masked_diffusion"]
    command += [
        "--model_args",
        f"pretrained={TINY},gen_length=40,block_length=8,use_mixed_precision=no",
        "--log_samples",
    ]
    command += flags(device="cpu", batch_size=8, tasks="gsm8k,logiqa", num_fewshot=0, output_path="out")
    env = os.environ | ENV | {"HF_HOME": str(folder / "hf")}
    made = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    assert made.returncode == 0, made.stderr[-3000:]
    [results] = folder.glob("out/*/results_*.json")
    samples = {task: lines(next(folder.glob(f"out/*/samples_{task}_*.jsonl"))) for task in ("gsm8k", "logiqa")}
    return json.loads(results.read_text()), samples, folder


@needs_lm_eval
def test_lm_eval_gsm8k(lm_evaluated, tiny):
    """lm_eval's own task, prompt, filter and metric count what tasks.verify counts of the sampler's texts."""
    results, samples, _ = lm_evaluated
    right = 0
    for problem, row in zip(problems(30), sorted(samples["gsm8k"], key=lambda row: row["doc_id"])[::2]):
        sample = config.SampleArguments(
            model_name_or_path=str(TINY), use_mixed_precision="no", device="cpu", gen_length=40, block_length=8
        )
        arguments.check(sample)
        ids = prompt_ids(tiny.tokenizer, {"prompt": problem.prompt}, "here", "none")
        text = sampler.respond(tiny.model, tiny.tokenizer, [ids], sample)[0].text
        assert row["arguments"]["gen_args_0"]["arg_0"] == problem.prompt and row["resps"] == [[text]]
        right += tasks.verify(problem, text) is True
    assert results["results"]["gsm8k"]["exact_match,strict-match"] == right / 30 and 4 <= right <= 26


@needs_lm_eval
def test_lm_eval_logiqa(lm_evaluated, tiny):
    """Each choice's likelihood is ours; the choice that lm_eval takes is the likeliest."""
    _, samples, _ = lm_evaluated
    for row in samples["logiqa"]:
        asked = [row["arguments"][f"gen_args_{index}"] for index in range(4)]
        ours = [tiny.loglikelihood([request(each["arg_0"], each["arg_1"])], disable_tqdm=True)[0][0] for each in asked]
        theirs = [float(each[0][0]) for each in row["resps"]]
        assert theirs == pytest.approx(ours, abs=1e-4) and len(set(theirs)) == 4
        assert row["acc"] == float(max(range(4), key=theirs.__getitem__) == 1)


@needs_lm_eval
@pytest.mark.long
def test_evaluate_runs_lm_evals_tasks_side_by_side(lm_evaluated, tiny_dir, monkeypatch, capsys):
    """The verdicts of lm_eval's command line; two models on the same documents beside a task of ours; resumed."""
    import datasets

    _, samples, folder = lm_evaluated
    monkeypatch.chdir(folder)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "hf" / "datasets")
    shutil.copytree(tiny_dir, "other")
    argv = flags(model=TINY, compare="other", device="cpu", gen_length=40, block_length=8, use_mixed_precision="no")
    argv += flags(tasks="arithmetic,lm_eval:gsm8k,lm_eval:logiqa", limit=20, num_fewshot=0, output_dir="compared")

    def evaluated():
        """What the command says, on both streams."""
        capsys.readouterr()
        assert call(evaluate.main, *argv) == 0
        return "".join(capsys.readouterr())

    said = evaluated()
    assert "generating" in said and "scoring" in said, said[-3000:]
    table = json.loads((folder / "compared" / "results.json").read_text())["table"]
    assert [(line["task"], line["n"]) for line in table] == [
        (task, n) for task, n in (("arithmetic", 20), ("lm_eval:gsm8k", 20), ("lm_eval:logiqa", 4)) for _ in range(2)
    ]
    for task, metric in (("gsm8k", "exact_match"), ("logiqa", "acc")):
        theirs = {row["doc_id"]: row[metric] for row in samples[task] if row["filter"] == samples[task][0]["filter"]}
        rows = lines(next((folder / "compared").glob(f"*tiny-lm_eval-{task}.jsonl")))
        verdicts = [row.get("lm_eval", row["correct"]) for row in rows]
        assert verdicts == [theirs[int(row["id"]) - 1] for row in rows]
        assert all(not row["lm_eval"] or row["correct"] for row in rows if "lm_eval" in row)
        assert rows[0]["metric"] == metric
        assert all(row["prompt"] and row["answer"] and isinstance(row["response"], str) for row in rows)
    answered = [row["response"] == row["answer"] for row in rows]  # logiqa: texts of choices
    assert answered == [row["correct"] for row in rows]
    results = (folder / "compared" / "results.json").read_bytes()
    said = evaluated()
    assert "generating" not in said and "scoring" not in said
    assert (folder / "compared" / "results.json").read_bytes() == results


@needs_lm_eval
@pytest.mark.parametrize(
    "name, words",
    [
        ("lm_eval:no_such", "lm_eval has no task 'no_such'"),
        ("lm_eval:arc_easy", "the data of lm_eval's arc_easy cannot be read"),
    ],
)
def test_tasks_that_lm_eval_has_not_are_refused(name, words, capsys, tmp_path):
    said = refusal(
        evaluate.main, capsys, "--model", TINY, "--tasks", name, "--output_dir", tmp_path / "out", "--device", "cpu"
    )
    assert words in said and not (tmp_path / "out").exists()


@needs_lm_eval
def test_answers_are_kept_as_they_come(tiny, monkeypatch):
    """lm_eval's cache is told of each batch, and each likelihood, when it is there: what a stop loses is one."""
    kept = []
    monkeypatch.setattr(tiny.cache_hook, "add_partial", lambda *told: kept.append(told))
    asked = [(problem.prompt, {"until": ["####"]}) for problem in problems(6)]
    texts = tiny.generate_until([request(*each) for each in asked], disable_tqdm=True)
    assert sorted(kept, key=str) == sorted(
        (("generate_until", each, text) for each, text in zip(asked, texts)), key=str
    )
    kept.clear()
    values = tiny.loglikelihood([request("a", " b"), request("a", " c")], disable_tqdm=True)
    assert kept == [("loglikelihood", ("a", " b"), values[0]), ("loglikelihood", ("a", " c"), values[1])]
