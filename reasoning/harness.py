"""lm-evaluation-harness with one more --model, masked_diffusion, whose --model_args are the names below, without dashes.

    pip install -r requirements-eval.txt
    python evaluate.py lm_eval run --model masked_diffusion --model_args pretrained=examples/tiny,gen_length=40 --tasks gsm8k --limit 4
    python evaluate.py lm_eval run --model masked_diffusion --model_args pretrained=examples/tiny,trajectories=16 --tasks arc_easy --limit 4

Those names are generate.py's sampling arguments and config.LikelihoodArguments; lm_eval's own flags: run --help. Text is made by generate.py's sampler, as
in evaluate.py, and likelihoods are the stepwise denoising score of score.py, a bound on log p(continuation | context) in
the mean over its noise, which is drawn by content: the same at every run. --apply_chat_template is lm_eval's own flag, and so is
--use_cache FILE, with which a job that was stopped goes on. `evaluate.py --tasks lm_eval:NAME` runs a task for several models.
"""

import sys
from dataclasses import replace

import torch
from tqdm import tqdm

import config
from files import InputError
from models import tokenization
from reasoning import prompts, sampler
from scoring import noise

try:
    from lm_eval.api.model import LM
except ImportError:  # main() says so in a sentence; the class works without, for whoever hands it requests
    LM = object

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # lm_eval's names for one thing
HONOURED = {*LENGTHS, "until", "do_sample", "temperature"}


class MaskedDiffusion(LM):
    """lm_eval's model interface. sample: SampleArguments as given, before sampler.check; a task may ask for other lengths.

    A subclass says what a likelihood is: diffusion_score, as score.py has it, a static method.
    """

    def __init__(self, sample, likelihood):
        super().__init__()
        for name in ("diffusion_steps", "trajectories", "states_per_forward"):
            if getattr(likelihood, name) < 1:
                raise InputError(f"{name} is {getattr(likelihood, name)}; expected at least 1")
        self.sample, self.likelihood = sample, likelihood
        checked = replace(sample)
        sampler.check(checked)
        self.model, self.tokenizer = sampler.load(checked)
        self._device = torch.device(checked.device)
        self.mask_id = tokenization.mask_token_id(sampler.config_of(self.model), self.tokenizer, checked.mask_token_id)
        self.response_tokenizer = tokenization.response_tokenizer(
            sample.model_name_or_path, self.tokenizer, sample.trust_remote_code
        )

    @classmethod
    def create_from_arg_string(cls, arg_string, additional_config=None):
        from lm_eval.utils import simple_parse_args_string

        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict, additional_config=None):
        """arg_dict: --model_args; additional_config: lm_eval's --batch_size, --max_batch_size and --device."""
        given = {name: value for name, value in (additional_config or {}).items() if value is not None}
        if given.get("device") == "cuda:0" and not torch.cuda.is_available():
            del given["device"]  # lm_eval's default, whatever there is
        if not str(given.get("batch_size", "")).isdigit():
            given.pop("batch_size", None)  # "auto": ours
        values = {**given, **arg_dict}
        values["model_name_or_path"] = values.pop("pretrained", None) or values.get("model_name_or_path")
        if "template" in values:
            raise InputError(
                "--model_args template: prompts are lm_eval's here; leave it out and use --apply_chat_template"
            )
        flags = [f"--{name}={value}" for name, value in values.items() if value is not None]
        return cls(*config.parse(flags, __doc__, config.SampleArguments, config.LikelihoodArguments))

    # --- text ---

    def sampling(self, options):
        """The SampleArguments that a request's generation options make of ours, with the same block and passes a token."""
        sample = self.sample
        length = next((int(options[name]) for name in LENGTHS if options.get(name)), sample.gen_length)
        temperature = float(options.get("temperature", sample.temperature)) if options.get("do_sample", True) else 0.0
        block, steps = sample.block_length, sample.steps
        if length != sample.gen_length:
            if block is not None:
                block = min(block, length)
                length -= length % block  # whole blocks: at most what was asked for
            if steps is not None:
                blocks = length // (block or length)
                steps = max(1, steps * length // sample.gen_length // blocks) * blocks
        made = replace(sample, gen_length=length, block_length=block, steps=steps, temperature=temperature)
        sampler.check(made)
        return made

    def generate_until(self, requests, disable_tqdm=False):
        """The text that answers each request's (context, options), cut before the first of the strings in "until"."""
        asked = [request.args for request in requests]
        if ignored := sorted({name for _, options in asked for name in options} - HONOURED):
            print(
                f"warning: this sampler has no {', '.join(ignored)}, which the task sets", file=sys.stderr, flush=True
            )
        groups = {}  # requests that can share a batch
        for index, (_, options) in enumerate(asked):
            sample = self.sampling(options)
            groups.setdefault((sample.gen_length, sample.temperature), (sample, []))[1].append(index)
        texts = [None] * len(asked)
        with tqdm(total=len(asked), desc="generating", disable=disable_tqdm) as bar:
            for sample, group in groups.values():
                prompts = [self.context(asked[index][0]) for index in group]

                def keep(replies, group=group):
                    for place, response in replies.items():
                        index = group[place]
                        texts[index] = cut(response.text, asked[index][1].get("until") or [])
                        self.cache("generate_until", asked[index], texts[index])
                    bar.update(len(replies))

                sampler.respond(self.model, self.tokenizer, prompts, sample, keys=group, finished=keep)
        return texts

    def cache(self, kind, asked, answer):
        """Keep an answer at once where lm_eval has a cache (--use_cache)."""
        if hasattr(self, "cache_hook"):
            self.cache_hook.add_partial(kind, asked, answer)

    def context(self, text):
        """Ids of a context: as lm_eval wrote it, chat template and all."""
        return prompts.prompt_ids(self.tokenizer, {"prompt": text}, "a context of lm_eval", "none")

    # --- likelihoods ---

    def loglikelihood(self, requests, disable_tqdm=False):
        """(stepwise score, whether greedy sampling says the same) of each request's (context, continuation)."""
        answers = []
        for request in tqdm(requests, desc="scoring", disable=disable_tqdm):
            answers.append(self.likelihood_of(*request.args))
            self.cache("loglikelihood", request.args, answers[-1])
        return answers

    @torch.no_grad()
    def likelihood_of(self, context, continuation):
        bare = context.rstrip()  # a space between the two belongs to the word that follows it
        prompt, continuation = self.context(bare), context[len(bare) :] + continuation
        response = tokenization.encode(self.response_tokenizer, continuation)
        if not response:
            return 0.0, True
        T, R = self.likelihood.diffusion_steps, self.likelihood.trajectories
        rng = noise.generator(self.likelihood.noise_seed, prompt + response, "chosen")
        masked = noise.state_masks(len(response), "spread", T, R, rng)  # (S, n)
        logps = self.diffusion_score(
            self.model,
            prompt,
            response,
            masked,
            noise.state_weights(masked, "spread", T, R),
            self.mask_id,
            self.likelihood.states_per_forward,
            self._device,
        )
        return float(logps.sum()), self.likelihood.check_greedy and self.says(prompt, response)

    def says(self, prompt, response):
        """Whether greedy sampling of just as many tokens, one a pass, gives `response`."""
        sample = replace(self.sample, gen_length=len(response), block_length=None, steps=None, temperature=0.0)
        sampler.check(sample)
        return sampler.generate(self.model, torch.tensor([prompt]), sample, self.mask_id)[0].tolist() == response

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        raise InputError(
            "this task asks for the perplexity of whole documents, which a masked diffusion model bounds only "
            "as loosely as its noise is coarse, and which is not offered; choose a task of another kind"
        )

    # --- chats ---

    @property
    def tokenizer_name(self):
        return self.sample.model_name_or_path.strip("/").replace("/", "__")

    def chat_template(self, chat_template=False):
        if not isinstance(chat_template, bool):
            raise InputError(
                f"--apply_chat_template {chat_template}: expected the flag alone; the model's template is used"
            )
        if not self.tokenizer.chat_template:
            raise InputError(
                f"--apply_chat_template: the tokenizer of {self.sample.model_name_or_path} has no chat template"
            )
        return self.tokenizer.chat_template

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        """The text of a dialogue up to and with the assistant's header, or with the assistant's words so far."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )


def cut(text, until):
    """`text` before the first of the strings `until`."""
    ends = [text.index(mark) for mark in ([until] if isinstance(until, str) else until) if mark and mark in text]
    return text[: min(ends)] if ends else text


# --- tasks of lm_eval, for evaluate.py --------------------------------------------------------------------

RIGHT_OR_WRONG = ("exact_match", "acc", "em", "pass_at_1")  # metrics that say it of one item, in this order


def needed():
    if LM is object:
        raise InputError("lm-evaluation-harness is not installed; run: pip install -r requirements-eval.txt")


def load_tasks(names):
    """{name: lm_eval's Task}, groups and tags taken apart."""
    needed()
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise InputError(
            f"--tasks: lm_eval has no task '{unknown[0]}'; list them with: python evaluate.py lm_eval ls tasks"
        )
    try:
        return manager.load(names)["tasks"]
    except (OSError, ValueError) as error:  # datasets' own errors are of these kinds
        raise InputError(
            f"--tasks: the data of lm_eval's {', '.join(names)} cannot be read ({' '.join(str(error).split())[:200]})"
        ) from None


def questions(task):
    """What lm_eval asks in each of a task's documents, without examples before it."""
    asked = [task.doc_to_text(doc) for doc in task.eval_docs]
    # some tasks have the place of an answer there, and their text in its choices
    return [
        text if isinstance(text, str) else " ".join(value for value in doc.values() if isinstance(value, str))
        for text, doc in zip(asked, task.eval_docs)
    ]


def run_task(name, task, model, places, chat, num_fewshot, cache):
    """[{"prompt", "response", "answer", "correct"}] of the documents `places` of a task, by lm_eval's evaluator and its first filter.

    model: a MaskedDiffusion; chat: whether its chat template is applied; num_fewshot: examples in the prompt, None for the
    task's own number; cache: a file that keeps the answers.
    """
    from lm_eval import simple_evaluate

    results = simple_evaluate(
        model,
        tasks=[task],
        samples={name: places},
        bootstrap_iters=0,
        log_samples=True,
        apply_chat_template=chat,
        num_fewshot=num_fewshot,
        use_cache=str(cache),
    )
    logged = results["samples"][name]
    logged = sorted((line for line in logged if line["filter"] == logged[0]["filter"]), key=lambda line: line["doc_id"])
    metric = next((metric for metric in RIGHT_OR_WRONG if metric in logged[0]["metrics"]), None)
    if metric is None or not all(line[metric] in (0, 1) for line in logged):
        raise InputError(
            f"--tasks: lm_eval's {name} measures {', '.join(logged[0]['metrics'])}, which say not right or wrong of one "
            "item; run it with evaluate.py lm_eval"
        )
    return [
        {
            "prompt": line["arguments"][0][0],
            "response": said(line),
            "answer": gold(line),
            "correct": bool(line[metric]),
            "metric": metric,
        }
        for line in logged
    ]


def said(line):
    """The answer of a logged line: the text that was sampled, or the likeliest of the choices."""
    if isinstance(line["resps"][0][0], str):
        return line["resps"][0][0]
    return choice(line, max(range(len(line["resps"])), key=lambda place: line["resps"][place][0][0]))


def gold(line):
    return (
        choice(line, line["target"]) if type(line["target"]) is int and len(line["resps"]) > 1 else str(line["target"])
    )


def choice(line, place):
    """The text of a choice; where choices differ in what stands before a common end, that."""
    context, text = line["arguments"][place][:2]
    return text.strip() if context == line["arguments"][place - 1][0] else context


def main(model, doc):
    """lm_eval's own command line, with `model`, a MaskedDiffusion, as --model masked_diffusion."""
    if sys.argv[1:] in ([], ["-h"], ["--help"]):  # lm_eval's own is that of each of its commands
        hidden = ("template", "config_file")
        config.parse(["--help"], doc, config.SampleArguments, config.LikelihoodArguments, hide=hidden)
    needed()
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model

    register_model("masked_diffusion")(model)
    cli_evaluate()
    return 0
