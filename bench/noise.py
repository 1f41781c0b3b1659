"""What noise costs at temperature 1 and a vocabulary of 126464: one uniform number a place, against one for every word.

    python bench/noise.py [--turns 3] [--words 126464] [--json FILE] [--quick]

greedy   temperature 0: no noise
uniform  the sampler: a place's token is drawn from the softmax by one uniform number (reasoning/commits.py)
at 0.7   the same at temperature 0.7, which takes a softmax of its own
gumbel   as LLaDA's generate.py: argmax of z - log(-log u), with a float64 u for every word of every place

Random models and prompts, one token a pass. Passes a second by the processor's time, medians of turns in which every
way is measured once. share: of a pass that the noise takes, (a pass - a greedy pass) / a pass.
"""

import argparse
import statistics
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import files
from config import SampleArguments
from models.llada import LLaDAConfig, LLaDAModelLM
from reasoning import arguments, commits, sampler

PROMPT, ROWS = 100, 4
CASES = [(128, 4), (512, 8)]  # width, layers


def gumbel(logits, uniforms, sample, ends, never=None):
    """In the place of commits.predict(): the argmax of exp(z) / (-log u)^temperature."""
    noise = torch.rand(logits.shape, dtype=torch.float64).log_().neg_().log_().mul_(-sample.temperature)
    tokens = noise.add_(logits).argmax(-1)
    return tokens, commits.confidences(logits, tokens, sample, ends)


WAYS = {  # (temperature, what predicts)
    "greedy": (0.0, commits.predict),
    "uniform": (1.0, commits.predict),
    "at 0.7": (0.7, commits.predict),
    "gumbel": (1.0, gumbel),
}
NOISY = [way for way in WAYS if way != "greedy"]


@contextmanager
def predicted_by(predict):
    before, commits.predict = commits.predict, predict
    yield
    commits.predict = before


def build(width, layers, words):
    config = LLaDAConfig(
        d_model=width,
        n_layers=layers,
        n_heads=4,
        n_kv_heads=4,
        mlp_hidden_size=3 * width,
        vocab_size=words,
        embedding_size=words,
        max_sequence_length=512,
        mask_token_id=3,
        eos_token_id=2,
    )
    return LLaDAModelLM(config).eval()


def measure(width, layers, args):
    """A row of the table."""
    response = 4 if args.quick else 32
    model = build(width, layers, args.words)
    prompts = torch.randint(10, args.words, (ROWS, PROMPT))
    seconds = {way: [] for way in WAYS}
    for _ in range(args.turns):
        for way, (temperature, predict) in WAYS.items():
            sample = SampleArguments(
                gen_length=response, temperature=temperature, use_mixed_precision="no", device="cpu"
            )
            arguments.check(sample)
            began = time.process_time()
            with predicted_by(predict):
                sampler.generate(model, prompts, sample, mask_id=3)
            seconds[way].append((time.process_time() - began) / response)
    found = {way: statistics.median(taken) for way, taken in seconds.items()}
    return {"width": width, "layers": layers, "parameters": model.num_parameters(), "seconds": found}


def show(row):
    seconds, greedy = row["seconds"], row["seconds"]["greedy"]
    rates = "".join(f"{1 / seconds[way]:9.2f}" for way in WAYS)
    shares = "".join(f"{100 * (1 - greedy / seconds[way]):9.1f}" for way in NOISY)
    print(
        f"{row['width']:5}{row['layers']:7} |{rates} |{shares} |{seconds['gumbel'] / seconds['uniform']:6.2f}",
        flush=True,
    )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--words", type=int, default=126464, help="of the vocabulary")
    parser.add_argument("--quick", action="store_true", help="one small case")
    parser.add_argument("--json", help="write the table there")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(
        f"{ROWS} rows of {PROMPT} + 32 tokens, {args.words} words, one thread\n"
        f"{'':12} |{'passes/s':>{9 * len(WAYS)}} |{'share of noise, %':>{9 * len(NOISY)}} |\n"
        f"width layers |{''.join(f'{way:>9}' for way in WAYS)} |{''.join(f'{way:>9}' for way in NOISY)} |{'x':>6}"
    )
    table = []
    for case in [(32, 1)] if args.quick else CASES:
        table.append(measure(*case, args))
        show(table[-1])
    if args.json:
        files.write_json(args.json, {"table": table, "torch": torch.__version__})


if __name__ == "__main__":
    main()
