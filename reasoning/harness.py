"""lm-evaluation-harness with one more --model, masked_diffusion. Its --model_args are the names below, without dashes.

    pip install -r requirements-eval.txt
    python evaluate.py lm_eval run --model masked_diffusion --model_args pretrained=DIR,gen_length=256 --tasks gsm8k
    python evaluate.py lm_eval run --model masked_diffusion --model_args pretrained=DIR,trajectories=16 --tasks arc_easy

Text is made by reasoning/sampler.py; a likelihood is the stepwise denoising score of score.py, a bound on
log p(continuation | context) in the mean over its noise, which is drawn by content: the same at every run.
lm_eval's own flags are listed by `python evaluate.py lm_eval run --help`. Two of them matter here:
--apply_chat_template, and --use_cache FILE, which keeps the answers, so that the same command resumes.
`python evaluate.py --tasks lm_eval:NAME` runs a task for several models and compares them.
"""

import functools
import sys
from dataclasses import replace
from operator import itemgetter

import torch
from tqdm import tqdm

import config
from files import InputError
from models import families, tokenization
from models.folders import downloading
from reasoning import answers, arguments, marks, prompts, sampler
from scoring import noise, recipe

try:
    from lm_eval.api.model import LM
except ImportError:  # main() says so in a sentence; the class works without, for whoever hands it requests
    LM = object

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # lm_eval's names for one thing
SUPPORTED = {*LENGTHS, "until", "do_sample", "temperature"}


class MaskedDiffusion(LM):
    """lm_eval's model interface. A subclass has the score, diffusion_score of score.py, as a static method.

    sample: SampleArguments as given, before arguments.check(): a task may ask for other lengths.
    """

    def __init__(self, sample, likelihood):
        super().__init__()
        for name in ("diffusion_steps", "trajectories", "tokens_per_forward"):
            if getattr(likelihood, name) < 1:
                raise InputError(f"{name} is {getattr(likelihood, name)}; expected at least 1")
        self.sample, self.likelihood = sample, likelihood
        checked = replace(sample)
        arguments.check(checked)
        self.model, self.tokenizer = sampler.load(checked)
        self._device = torch.device(checked.device)
        mask_id = tokenization.mask_token_id(sampler.config_of(self.model), self.tokenizer, checked.mask_token_id)
        self.masking = families.Masking(mask_id, sampler.blocks_of(self.model))
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
        """The SampleArguments of a request's generation options: other lengths, the same block and passes per token."""
        given = self.sample
        length = next((int(options[name]) for name in LENGTHS if options.get(name)), given.gen_length)
        temperature = float(options.get("temperature", given.temperature))
        if not options.get("do_sample", True):
            temperature = 0.0
        block, steps = given.block_length, given.steps
        if length != given.gen_length:
            whole = length
            if block is not None and not self.masking.blocks:
                whole = block = min(block, length)
                length -= length % block  # whole blocks: at most what was asked for
            if steps is not None:
                blocks = length // whole
                steps = max(1, steps * length // given.gen_length // blocks) * blocks
        made = replace(given, gen_length=length, block_length=block, steps=steps, temperature=temperature)
        arguments.check(made)
        return made

    def generate_until(self, requests, disable_tqdm=False):
        """The text that answers each request's (context, options), cut before the first of the strings in "until"."""
        asked = [request.args for request in requests]
        warn_of_options([options for _, options in asked])
        texts = [None] * len(asked)
        with tqdm(total=len(asked), desc="generating", disable=disable_tqdm) as bar:
            for sample, group in self.groups(asked):

                def keep(replies, group=group):
                    for place, response in replies.items():
                        index = group[place]
                        texts[index] = cut(marks.without_thoughts(response.text), asked[index][1].get("until") or [])
                        self.cache("generate_until", asked[index], texts[index])
                    bar.update(len(replies))

                contexts = [self.context(asked[index][0]) for index in group]
                sampler.respond(self.model, self.tokenizer, contexts, sample, keys=group, finished=keep)
        return texts

    def groups(self, asked):
        """[(SampleArguments, indices)] of requests that can share a batch."""
        found = {}
        for index, (_, options) in enumerate(asked):
            sample = self.sampling(options)
            found.setdefault((sample.gen_length, sample.temperature), (sample, []))[1].append(index)
        return list(found.values())

    def cache(self, kind, asked, answer):
        """Keep an answer at once where lm_eval has a cache (--use_cache)."""
        if hasattr(self, "cache_hook"):
            self.cache_hook.add_partial(kind, asked, answer)

    def context(self, text):
        """Ids of a context: as lm_eval wrote it, chat template and all."""
        return prompts.prompt_ids(self.tokenizer, {"prompt": text}, "a context of lm_eval", "none")

    # --- likelihoods ---

    def loglikelihood(self, requests, disable_tqdm=False):
        """(score, whether greedy sampling says the same) of each request's (context, continuation)."""
        answers = []
        for request in tqdm(requests, desc="scoring", disable=disable_tqdm):
            answers.append(self.likelihood_of(*request.args))
            self.cache("loglikelihood", request.args, answers[-1])
        return answers

    @torch.no_grad()
    def likelihood_of(self, context, continuation):
        """(score, whether greedy sampling says the same) of one continuation; the latter only with check_greedy."""
        bare = context.rstrip()  # a space between the two belongs to the word that follows it
        prompt, continuation = self.context(bare), context[len(bare) :] + continuation
        response = tokenization.encode(self.response_tokenizer, continuation)
        if not response:
            return 0.0, True
        T, R = self.likelihood.diffusion_steps, self.likelihood.trajectories
        rng = noise.generator(self.likelihood.noise_seed, prompt + response, "chosen")
        estimator = "elbo_stratified" if self.masking.blocks else "spread"
        divided = recipe.partition(len(prompt), len(response), self.masking.blocks)
        masked = noise.state_masks(len(response), estimator, T, R, rng, **divided)  # (S, n)
        weights = noise.state_weights(masked, estimator, T, R, **divided)  # (S, n)
        at_once = self.likelihood.tokens_per_forward
        scores = self.diffusion_score(
            self.model, prompt, response, masked, weights, self.masking, at_once, self._device
        )  # (S,)
        return float(scores.sum()), self.likelihood.check_greedy and self.says(prompt, response)

    def says(self, prompt, response):
        """Whether greedy sampling of just as many tokens, one a pass, gives `response`."""
        sample = replace(self.sample, gen_length=len(response), block_length=None, steps=None, temperature=0.0)
        arguments.check(sample)
        made = sampler.generate(self.model, torch.tensor([prompt]), sample, self.masking.mask_id)
        return made[0].tolist() == response

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        raise InputError(
            "this task asks for the perplexity of whole documents, which a masked diffusion model does not have; "
            "choose a task of another kind"
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
        if not tokenization.uses_chat(self.tokenizer, "auto"):
            raise InputError(
                f"--apply_chat_template: the tokenizer of {self.sample.model_name_or_path} has no chat template"
            )
        return tokenization.default_template(self.tokenizer)

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        """The text of a dialogue up to and with the assistant's header, or with the assistant's words so far."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )


def warn_of_options(options):
    """Warn of generation options that the sampler does not have."""
    unsupported = sorted(set().union(*options) - SUPPORTED)
    if unsupported:
        print(
            f"warning: this sampler has no {', '.join(unsupported)}, which the task sets", file=sys.stderr, flush=True
        )


def cut(text, until):
    """`text` before the first of the strings `until`."""
    ends = [text.index(mark) for mark in ([until] if isinstance(until, str) else until) if mark and mark in text]
    return text[: min(ends)] if ends else text


# --- tasks of lm_eval, for evaluate.py --------------------------------------------------------------------

RIGHT_OR_WRONG = (
    "exact_match",
    "acc",
    "em",
    "pass_at_1",
)  # metrics of one item that are 0 or 1; the first found counts


def check_installed():
    if LM is object:
        raise InputError("lm-evaluation-harness is not installed; run: pip install -r requirements-eval.txt")


@functools.cache
def task_manager():
    """lm_eval's index of its tasks; to make it takes seconds."""
    check_installed()
    from lm_eval.tasks import TaskManager

    return TaskManager()


def load_tasks(names):
    """{name: lm_eval's Task}, groups and tags taken apart."""
    manager = task_manager()
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise InputError(
            f"--tasks: lm_eval has no task '{unknown[0]}'; list them with: python evaluate.py lm_eval ls tasks"
        )
    with downloading(f"--tasks: the data of lm_eval's {', '.join(names)} cannot be read"):
        return manager.load(names)["tasks"]


def questions(task):
    """What lm_eval asks in each of a task's documents, without examples before it."""
    return [question(task, doc) for doc in task.eval_docs]


def question(task, doc):
    text = task.doc_to_text(doc)
    if isinstance(text, str):
        return text
    return " ".join(value for value in doc.values() if isinstance(value, str))  # the text is in the choices


def run_task(name, task, model, places, chat, num_fewshot, cache):
    """[{"prompt", "response", "answer", "correct", "metric"}] of documents `places` of a task, by its first filter.

    Where the model writes an answer that reasoning/answers.py can verify, "correct" and "extracted" are that reader's,
    and "lm_eval" is the verdict of the task's filter.

    model: a MaskedDiffusion; chat: whether its chat template is applied; num_fewshot: examples in the prompt, None for
    the task's own number; cache: a file that keeps the answers.
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
        task_manager=task_manager(),
    )
    logged = results["samples"][name]
    logged = sorted((line for line in logged if line["filter"] == logged[0]["filter"]), key=itemgetter("doc_id"))
    metric = next((metric for metric in RIGHT_OR_WRONG if metric in logged[0]["metrics"]), None)
    if metric is None or not all(line[metric] in (0, 1) for line in logged):
        raise InputError(
            f"--tasks: lm_eval's {name} measures {', '.join(logged[0]['metrics'])}, none of which is right or wrong "
            "for one item; run it with evaluate.py lm_eval"
        )
    rows = [
        {
            "prompt": line["arguments"][0][0],
            "response": response_of(line),
            "answer": gold(line),
            "correct": bool(line[metric]),
            "metric": metric,
        }
        for line in logged
    ]
    right = [right_answer(line, metric) for line in logged]
    if None in right:
        return rows
    return [row | {"lm_eval": row["correct"]} | answers.grade(*each, row["response"]) for row, each in zip(rows, right)]


def right_answer(line, metric):
    """The answers.Gold of a logged line whose response is an answer in words; None for choices and programs."""
    is_written = isinstance(line["resps"][0][0], str) and isinstance(line["target"], (str, int, float))
    return answers.gold(str(line["target"])) if is_written and metric in ("exact_match", "em") else None


def response_of(line):
    """The answer of a logged line: the text that was sampled, or the likeliest of the choices."""
    responses = [each[0] for each in line["resps"]]
    if isinstance(responses[0], str):
        return responses[0]
    likelihoods = [likelihood for likelihood, _ in responses]
    return choice(line, likelihoods.index(max(likelihoods)))


def gold(line):
    """The right answer of a logged line."""
    if type(line["target"]) is int and len(line["resps"]) > 1:
        return choice(line, line["target"])
    return str(line["target"])


def choice(line, place):
    """The text of a choice; where choices differ in what stands before a common end, that."""
    context, text = line["arguments"][place][:2]
    return text.strip() if context == line["arguments"][place - 1][0] else context


def main(model, doc, argv):
    """lm_eval's own command line, given argv, with `model`, a MaskedDiffusion, as --model masked_diffusion."""
    if argv in ([], ["-h"], ["--help"]):  # lm_eval's own is that of each of its commands
        hidden = ("template", "config_file", "base_model")
        config.parse(["--help"], doc, config.SampleArguments, config.LikelihoodArguments, hide=hidden)
    check_installed()
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model

    register_model("masked_diffusion")(model)
    script, *rest = sys.argv
    sys.argv = [f"{script} lm_eval", *argv]
    try:
        cli_evaluate()
    finally:
        sys.argv = [script, *rest]
    return 0
