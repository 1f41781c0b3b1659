"""Models with one planted habit each: the embedded model after SFT on solutions of which some have the habit's error.

    python bench/habits.py operation --out runs/habits/operation        the model: runs/habits/operation/sft/final

    none        right solutions: the embedded model without its early end, the other two without their habit
    operation   the last step adds where it should subtract or multiply
    slip        from 10 on, the answer is one more than the result of the last step

The rows are --num problems of the training split. Of those where a habit may show, --share have its error, so that at
temperature 1 the model makes it in some responses and not in others. The wrong result has as many digits as the right
one: otherwise the length of the response would show the habit where every token is hidden. Run the same command to
resume.
"""

import argparse
import os
import random
import subprocess
import sys
from pathlib import Path

import jsonlines

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from cli import exits
from files import replacing
from reasoning import arithmetic, tasks

SEED = 6
TINY = ROOT / "examples" / "tiny"
# The last stage of examples/make_tiny.sh: responses are padded with end tokens, which count in the loss.
FLAGS = "--loss_type sft --sft_pad_to 40 --per_device_train_batch_size 32 --gradient_accumulation_steps 1"
FLAGS += " --weight_decay 0.01 --adam_beta2 0.99 --seed 5 --noise_seed 5 --logging_steps 50 --save_steps 300"
FLAGS += " --eval_fraction 0.002 --use_mixed_precision no --gradient_checkpointing false"


# --- the errors -------------------------------------------------------------------------------------------


def added(steps):
    """Adds where the last step subtracts or multiplies: (the steps, the answer); None where it does neither."""
    *before, (a, op, b, _) = steps
    wrong = arithmetic.compute(a, "+", b)
    return ([*before, (a, "+", b, wrong)], wrong) if op in "-*" and wrong else None


def one_more(steps):
    """The answer is one more than the last result, which is right: (the steps, the answer); None below 10."""
    result = steps[-1][3]
    return (steps, result + 1) if result >= 10 and result % 10 < 9 else None


HABITS = {"none": None, "operation": added, "slip": one_more}


def with_habit(problem, habit):
    """The solution with the habit's error; None where it cannot show: in another answer with as many digits."""
    found = habit and habit(problem.steps)
    if not found or str(found[1]) == problem.answer or len(str(found[1])) != len(problem.answer):
        return None
    return arithmetic.write(["%d %s %d = %d" % step for step in found[0]], found[1])


def rows(name, num, share):
    """SFT rows {"prompt", "response"} of `num` problems, the same for every habit."""
    rng = random.Random(f"habit {SEED}")
    for problem in tasks.generate(num, "train", SEED):
        wrong, number = with_habit(problem, HABITS[name]), rng.random()
        yield {"prompt": problem.prompt, "response": wrong if wrong and number < share else problem.solution}


# --- the model --------------------------------------------------------------------------------------------


def environment():
    """The variables of a script: one thread, and no GPU unless one is chosen, as these models are no work for it."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if "CUDA_VISIBLE_DEVICES" not in env:
        env.setdefault("DS_ACCELERATOR", "cpu")
    return env


def run(script, *flags):
    subprocess.run([sys.executable, ROOT / script, *map(str, flags)], check=True, env=environment())


def read_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=HABITS)
    parser.add_argument("--out", type=Path, required=True, help="folder of the rows and the model")
    parser.add_argument("--model_name_or_path", default=TINY, help="what is trained")
    parser.add_argument("--num", type=int, default=29000, help="problems")
    parser.add_argument("--share", type=float, default=0.7, help="of the problems where the habit may show")
    parser.add_argument("--max_steps", type=int, default=900)
    parser.add_argument("--learning_rate", default="1e-3")
    return parser.parse_args(argv)


def main(argv=None):
    args = read_arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    path, packed = args.out / "rows.jsonl", args.out / "packed"
    model = ["--model_name_or_path", args.model_name_or_path]
    if not path.exists():
        with replacing(path) as file:
            jsonlines.Writer(file).write_all(rows(args.name, args.num, args.share))
    run("data_prep.py", "--reuse", "--task", "sft", "--in", path, "--out", packed, *model)
    sizes = ["--max_steps", args.max_steps, "--learning_rate", args.learning_rate]
    output = ["--output_dir", args.out / "sft", "--deepspeed", ROOT / "ds_configs" / "zero0.json"]
    run("train_dpo.py", "--data", packed, *output, *model, *sizes, *FLAGS.split())
    print(f"{args.out / 'sft' / 'final'}: the model")


if __name__ == "__main__":
    exits.run(main)
