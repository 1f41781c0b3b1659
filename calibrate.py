"""How much of each estimator's gradient your pairs agree on, on your model, and at which noise levels.

    packed/ + model -> packed/calibration-<key>.json, .png; read by --diffusion_steps auto
    python data_prep.py --in examples/prefs.jsonl
    python calibrate.py --data packed --use_mixed_precision no --pairs 4

DPO's first steps go along the gradient of S(chosen) - S(rejected), averaged over pairs. Every design (estimator, T, R)
is drawn a few times for some pairs, and the share of such a gradient that pairs agree on is its signal
(scoring/signal.py). The truth, for its bias and for the levels, is the score in steps of one token: every level once,
or 64 levels if there are more (of each block, where the model is block-causal). Gradients are held as sketches
(models/sketch.py). It recommends a design for few pairs and one for many (scoring/calibration.py).

n response tokens, T denoising steps, R trajectories, P pairs, D draws, K numbers of a sketch, B bins of levels.
"""

import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import config
from cli import exits
from cli.parser import arg, names
from preferences import packed as disk
from scoring import noise, recipe, signal
from scoring.calibration import cheapest, densest, designs_of, is_finite, key, place, signal_of

UNUSED = {"end_token_id", "lora_r", "lora_alpha", "lora_targets"}
UNUSED |= {"diffusion_steps", "trajectories", "estimator", "order", "block_length", "noise_sets", "ld_alpha"}
UNUSED |= names(config.DataArguments, config.TrainArguments) - {"data"}


@dataclass
class CalibrateArguments:
    pairs: int = arg(32, "pairs to measure on", heading="Calibration")
    draws: int = arg(2, "draws of each estimator for each pair")
    reuse: bool = arg(
        False, "measure only if --diffusion_steps is auto and --data holds no calibration of this model yet"
    )


def read_arguments(argv=None):
    """One instance of each of config.GROUPS and CalibrateArguments, checked as far as this needs nothing from disk."""
    groups = config.parse(argv, __doc__, *config.GROUPS, CalibrateArguments, hide=UNUSED)
    config.check_scoring(groups[1], groups[2])
    return groups


def nothing_to_measure(groups):
    """Why --reuse leaves nothing to measure ("" if --diffusion_steps is not auto); None if there is something."""
    data_args, model_args, noise_args, train_args, args = groups
    if not args.reuse:
        return None
    if noise_args.diffusion_steps != "auto" or train_args.loss_type == "sft":
        return ""
    packed = disk.Packed(data_args.data)
    recipe.check(packed, model_args, noise_args)
    path = place(packed, model_args)
    return f"{path}: up to date" if path.exists() else None


def early():
    """Read the arguments; end the process where nothing is to be measured."""
    exits.end_if(nothing_to_measure(read_arguments()))


if __name__ == "__main__":
    exits.early(early)  # answers --help and mistakes before the imports below, which take seconds

import numpy as np
import torch.distributed as dist

import files
import score
from cli.progress import progress
from files import InputError
from models import architecture, families
from models.sketch import Sketch
from scoring.calibration import Design
from scoring.states import response_states
from scoring.window import Piece
from training import deepspeed_config, engine, streaming

LEVELS = 64  # of the truth, at most
CLEAR = 2  # standard errors that a signal must be above 0


# --- gradients --------------------------------------------------------------------------------------------


def truth_design(n, blocks):
    """The design that stands for the truth, for a response of n tokens."""
    return Design("elbo_stratified", min(n, blocks.size if blocks else n, LEVELS), 1)


class Drawn(NamedTuple):
    """The states of a response under one draw."""

    masked: np.ndarray  # (S, n) bool
    weight: np.ndarray  # (S, n) float32
    bins: np.ndarray  # (S, n) of signal.level_bins()


def margin(scores):
    """The loss whose gradient is measured."""
    return scores[0] - scores[1]


class Measurement(NamedTuple):
    """What gradients are measured with."""

    model: Any
    sketch: Sketch
    packed: disk.Packed
    pairs: np.ndarray
    masking: families.Masking
    tokens_per_forward: int
    noise_seed: int
    ranks: engine.Ranks

    def draw(self, index, side, design, draw):
        """The Drawn of a response of pair `index`; side 0 is chosen, 1 rejected."""
        prompt, n, blocks = self.packed[index][0], len(self.packed[index][1 + side]), self.masking.blocks
        design = design or truth_design(n, blocks)
        stream = f"{noise.side_of(design.estimator, side, blocks is not None)} calibration {tuple(design)}"
        rng = noise.generator(self.noise_seed, self.packed.content(index), stream, draw)
        divided = recipe.partition(len(prompt), n, blocks)
        masked = noise.state_masks(n, *design, rng, **divided)
        return Drawn(masked, noise.state_weights(masked, *design, **divided), signal.level_bins(masked, **divided))

    def gradient(self, index, drawn):
        """(gradient (K,) of a pair's margin, forward passes of one state that it took). drawn: of both responses."""
        prompt, *responses = self.packed[index]
        states = [
            response_states(prompt, response, each.masked, each.weight, *self.masking)
            for response, each in zip(responses, drawn)
        ]
        piece = Piece(states, margin, slopes=[1.0, -1.0])
        self.sketch.clear()
        score.score_and_backward(self.model, [piece], self.tokens_per_forward, self.ranks, backward)
        return self.sketch.gradient().numpy(), sum(len(each.live) for each in states)

    def of_design(self, design, draws, bar):
        """(gradients (P, D, K) of a design, forward passes of all of them)."""
        found, passes = [], 0
        for index in self.pairs:
            for draw in range(draws):
                gradient, count = self.gradient(index, [self.draw(index, side, design, draw) for side in (0, 1)])
                found.append(gradient)
                passes += count
            bar.update()
        return np.stack(found).reshape(len(self.pairs), draws, -1), passes

    def of_truth(self, bar):
        """(gradients (P, B, K) of the levels of each bin, whose sum is the truth's; forward passes of all of them)."""
        found, passes = [], 0
        for index in self.pairs:
            drawn = [self.draw(index, side, None, 0) for side in (0, 1)]
            for level in range(signal.BINS):
                of_level = [each._replace(weight=each.weight * (each.bins == level)) for each in drawn]
                gradient, count = self.gradient(index, of_level)
                found.append(gradient)
                passes += count
            bar.update()
        return np.stack(found).reshape(len(self.pairs), signal.BINS, -1), passes


def backward(loss, _):
    """No engine's: the weights have no gradient that an engine would have to reduce."""
    loss.backward()


# --- the calibration --------------------------------------------------------------------------------------


def prepare(packed, model_args, noise_args, args, masking, ranks):
    """The Measurement: some pairs, the model with its sketch, and as many tokens in a pass as fit."""
    rng = np.random.default_rng(noise_args.noise_seed)
    pairs = np.sort(rng.choice(len(packed), min(args.pairs, len(packed)), replace=False))
    model = architecture.bare(streaming.load(model_args, ranks))  # an engine has no backward pass without an optimizer
    if model_args.gradient_checkpointing:
        architecture.recompute_activations(model)
    sketch = Sketch(model)
    tokens = score.tokens_of_a_pass(model, packed, model_args.tokens_per_forward, masking, ranks, has_graph=True)
    return Measurement(model, sketch, packed, pairs, masking, tokens, noise_args.noise_seed, ranks)


def most_passes(measurement, draws):
    """Forward passes of one state that a calibration makes at most: a state that scores nothing needs none."""
    blocks, bounds = measurement.masking.blocks, measurement.packed.bounds[measurement.pairs]
    responses = np.diff(bounds[:, 1:4], axis=1).ravel().tolist()
    of_designs = len(responses) * draws * sum(noise.state_count(*design) for design in designs_of(blocks))
    of_truth = sum(truth_design(n, blocks).diffusion_steps for n in responses)
    return of_designs + of_truth * (signal.BINS if blocks else 1)  # blocks of one state have several levels


def epoch_passes(packed, blocks):
    """(forward passes of one state in an epoch of training with the default design, its states of a response)."""
    states = noise.state_count(*noise.default_design(has_blocks=blocks is not None))
    return 2 * len(packed) * states, states


def measured(measurement, designs, draws):
    """(rows of the table, gradients (P, B, K) of the truth's levels, forward passes of one state of all of it)."""
    rows, bars = [], len(measurement.pairs) * (len(designs) + 1)
    with progress(bars, "pair", "calibration", disable=not measurement.ranks.first) as bar:
        by_level, total = measurement.of_truth(bar)
        truth = by_level.sum(1)
        for design in designs:
            gradients, passes = measurement.of_design(design, draws, bar)
            per_response = {"passes": passes / (2 * len(measurement.pairs) * draws)}
            rows.append(design._asdict() | per_response | signal.measure(gradients, truth))
            total += passes
    return rows, by_level, total


def run(packed, model_args, noise_args, args, masking, ranks):
    """Measure the designs, and write the table and its plot."""
    # 1. The model and some pairs, and what it will take
    if min(len(packed), args.pairs) < 3 or args.draws < 2:
        raise InputError("a calibration compares pairs and draws: at least 3 pairs, --pairs 3 and --draws 2 are needed")
    measurement = prepare(packed, model_args, noise_args, args, masking, ranks)
    of_epoch, states = epoch_passes(packed, masking.blocks)
    if ranks.first:
        passes = most_passes(measurement, args.draws)
        print(
            f"calibration: at most {passes:,} forward and backward passes of one state, as {passes / of_epoch:.1f} "
            f"epochs of training on these {len(packed)} pairs with {states} states a response",
            flush=True,
        )

    # 2. The gradients of the truth, and of each design
    began = time.time()
    rows, by_level, passes = measured(measurement, designs_of(masking.blocks), args.draws)
    if not is_finite(rows):
        raise InputError(
            f"{model_args.model_name_or_path}: the gradients of its scores are 0 or not finite; the model is broken or "
            "its numbers overflow (try --use_mixed_precision no)"
        )

    # 3. The table
    if ranks.first:
        levels = signal.shares(by_level)
        table = {
            "depends_on": key(packed, model_args),
            "pairs": len(measurement.pairs),
            "draws": args.draws,
            "price": {"passes": passes, "seconds": time.time() - began, "epochs": passes / of_epoch},
            "rows": rows,
            "levels": {"share": levels.value.tolist(), "error": levels.error.tolist()},
            "few_pairs": design_of(cheapest(rows)),
            "many_pairs": design_of(densest(rows)),
        }
        report(table, place(packed, model_args))
    dist.barrier()


def design_of(row):
    """{"estimator", "diffusion_steps", "trajectories"} of a row."""
    return {name: row[name] for name in Design._fields}


# --- what is written --------------------------------------------------------------------------------------


def report(table, path):
    """Print the table and what follows from it, write it and its plot."""
    show(table["rows"])
    numbers = [f"{share:.0%} +- {100 * error:.0f}" for share, error in zip(*table["levels"].values())]
    print(f"the true gradient by hidden share, most hidden last: {', '.join(numbers)}")
    files.write_json(path, table)
    plot(table, path.with_suffix(".png"))
    price = table["price"]
    print(
        f"{path}, {path.with_suffix('.png').name}: of {table['pairs']} pairs, {table['draws']} draws; "
        f"{price['passes']:,} passes, as {price['epochs']:.1f} epochs; {price['seconds']:.0f} s"
    )
    best = max(table["rows"], key=signal_of)
    if best["signal"] < CLEAR * best["signal_error"]:
        print("warning: these pairs show no gradient that they agree on, so designs cannot be compared; more --pairs")
    print(f"few pairs (pairs are the limit): {flags(table['few_pairs'])} (or --diffusion_steps auto)")
    print(f"many pairs (compute is the limit): {flags(table['many_pairs'])}", flush=True)


def flags(design):
    return " ".join(f"--{name} {value}" for name, value in design.items())


def show(rows):
    """Print the table: passes per response, and signal per pass relative to the best's."""
    print(f"{'estimator':<16}{'T':>4}{'R':>4}{'passes':>8}{'signal':>9}{'':>7}{'per pass':>10}{'noise':>8}{'bias':>7}")
    most = max(row["signal"] / row["passes"] for row in rows)
    for row in sorted(rows, key=passes_of):
        print(
            f"{row['estimator']:<16}{row['diffusion_steps']:4d}{row['trajectories']:4d}{row['passes']:8.1f}"
            f"{row['signal']:9.1%} +-{100 * row['signal_error']:4.1f}"
            f"{row['signal'] / row['passes'] / most:10.2f}{row['noise']:8.0%}{row['bias']:7.0%}"
        )


def plot(table, path):
    """Signal against forward passes, and the share of each bin of levels."""
    from matplotlib.figure import Figure  # imported here: nothing else needs it

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    designs, levels = figure.subplots(1, 2)
    for colour, estimator in enumerate(noise.ESTIMATORS):
        mine = [row for row in table["rows"] if row["estimator"] == estimator]
        if mine:
            plot_estimator(designs, sorted(mine, key=passes_of), estimator, f"C{colour}")
    designs.set(xlabel="forward passes per response", ylabel="signal", title="what pairs agree on")
    designs.legend(fontsize=8)
    middles = (np.arange(signal.BINS) + 0.5) / signal.BINS
    levels.bar(middles, table["levels"]["share"], 0.9 / signal.BINS, yerr=table["levels"]["error"], capsize=3)
    levels.set(xlabel="hidden share of the response", ylabel="share", title="levels it comes from")
    with files.replacing(path, "wb") as file:
        figure.savefig(file, format="png", dpi=120)


def plot_estimator(axes, rows, estimator, colour):
    """One estimator's designs, each labelled TxR."""
    passes, signals = [row["passes"] for row in rows], [row["signal"] for row in rows]
    errors = [row["signal_error"] for row in rows]
    axes.errorbar(passes, signals, errors, fmt="o", color=colour, label=estimator, capsize=3)
    for row in rows:
        label = f"{row['diffusion_steps']}x{row['trajectories']}"
        near = {"textcoords": "offset points", "xytext": (4, 3)}
        axes.annotate(label, (row["passes"], row["signal"]), fontsize=7, color=colour, **near)


def passes_of(row):
    return row["passes"]


def main(argv=None):
    groups = data_args, model_args, noise_args, _, args = read_arguments(argv)
    if nothing_to_measure(groups) is not None:
        return 0
    deepspeed_config.read_ds_config(model_args.deepspeed)
    packed = disk.Packed(data_args.data)
    packed.need("preferences")
    masking = recipe.check(packed, model_args, noise_args)
    run(packed, model_args, noise_args, args, masking, engine.start())
    return engine.leave()


if __name__ == "__main__":
    exits.run(main)
