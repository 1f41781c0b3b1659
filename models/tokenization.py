"""Tokenizers: load, fingerprint, chat templates, the ids of a prompt and of a response."""

from typing import NamedTuple

import jinja2
import transformers
from transformers import AutoTokenizer

from files import InputError, fingerprint, read_json
from models.architecture import load_config
from models.families import MASK_TOKENS, TOKENIZERS
from models.folders import tokenizer_folder

PROBE = "A probe: 1234 + 5 = 1,239\n\n  caf\u00e9 \u6f22\u5b57 <x>\t'quoted'"  # shows merges and normalisation


def load_tokenizer(name, trust_remote_code=False, **kwargs):
    """The folder's tokenizer through AutoTokenizer (tokenizer.json, or a sentencepiece tokenizer.model)."""
    folder = tokenizer_folder(name)
    config = load_config(name, trust_remote_code)  # refuses a model that cannot be loaded
    settings = folder / "tokenizer_config.json"
    if (folder / "tokenizer.model").exists() and not settings.exists():
        raise InputError(
            f"{folder}: its tokenizer.model needs a tokenizer_config.json beside it that names tokenizer_class "
            "(LlamaTokenizer for SMDM)"
        )
    try:
        named = read_json(settings, "downloading the model again") if settings.exists() else {}
        if equivalent := TOKENIZERS.get(named.get("tokenizer_class")):
            tokenizer = getattr(transformers, equivalent).from_pretrained(folder, **kwargs)
        else:
            options = {"config": config, "trust_remote_code": trust_remote_code}
            tokenizer = AutoTokenizer.from_pretrained(folder, **options, **kwargs)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise InputError(f"{folder}: its tokenizer cannot be loaded ({' '.join(str(error).split())[:200]})") from None
    if tokenizer.eos_token_id is None and tokenizer.sep_token_id is not None:
        tokenizer.eos_token = tokenizer.sep_token  # BERT and its relatives end a text with it
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"{folder}: its tokenizer names no eos_token, which ends every response; add it to tokenizer_config.json"
        )
    return tokenizer


def response_tokenizer(name, tokenizer, trust_remote_code=False):
    """The tokenizer for text that follows other text: without sentencepiece's dummy prefix, where there is one."""
    if not tokenizer.convert_ids_to_tokens(encode(tokenizer, "x"))[0].startswith("\u2581"):
        return tokenizer
    return load_tokenizer(name, trust_remote_code, add_prefix_space=False)


def encode(tokenizer, text):
    """Ids of `text`, nothing added."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def uses_chat(tokenizer, template):
    """Whether prompts go through the chat template: `template` is auto (if the tokenizer has one), chat or none."""
    if template == "none":
        return False
    templates = tokenizer.chat_template
    if template == "chat" and not templates:
        raise InputError("--template chat: this tokenizer has no chat template; use --template none")
    if templates and not default_template(tokenizer):
        raise InputError(
            f"this tokenizer has chat templates for {', '.join(sorted(templates))} and none named default; rename one "
            "in its tokenizer_config.json (or in additional_chat_templates/), or use --template none"
        )
    return bool(templates)


def default_template(tokenizer):
    """The chat template that is applied: a tokenizer may have several by name. None where there is none."""
    templates = tokenizer.chat_template
    return templates.get("default") if isinstance(templates, dict) else templates


def prompt_text(tokenizer, prompt, template):
    """The text that precedes a response: the raw string, or its rendering up to and including the assistant's header.

    prompt: a string (in a chat, one user message) or a list of {"role", "content"} messages, which needs a template.
    The text contains all special tokens that it needs, so encode it with nothing added.
    """
    if not uses_chat(tokenizer, template):
        if isinstance(prompt, str):
            return prompt
        raise InputError("conversational rows need a chat template, and this tokenizer has none (or --template none)")
    return render(tokenizer, as_messages(prompt))


def as_messages(prompt):
    """A list of messages; a string is one user message."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def render(tokenizer, messages, header=True):
    """The chat template's text of `messages`; header: then the header of an assistant's message."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=header)
    except jinja2.TemplateError as error:
        raise InputError(f"the chat template refuses these messages ({error})") from None


ANSWER = " @answer@ "  # stands for any answer, to see what a template does with one


class Turn(NamedTuple):
    """How a chat template renders the last message of a conversation, which is the assistant's."""

    opening: str  # between the header and the answer: Qwen3's templates put an empty <think> block there
    closing: str  # after the answer
    strips: bool  # the answer loses white space at its ends


def assistant_turn(tokenizer):
    """The Turn of a tokenizer that has a chat template."""
    prompt = [{"role": "user", "content": "x"}]
    whole = render(tokenizer, [*prompt, {"role": "assistant", "content": ANSWER}], header=False)
    before, _, closing = whole.rpartition(ANSWER.strip())
    strips = ANSWER not in whole
    if not strips:
        before, closing = before[:-1], closing[1:]
    header = render(tokenizer, prompt)
    opening = before.removeprefix(header) if before.startswith(header) else ""
    return Turn(opening, closing, strips)


def rendered_fields(tokenizer, names):
    """The fields `names` of an assistant's last message that the chat template renders beside its content."""
    said = {"role": "assistant", "content": "y"}
    prompt = [{"role": "user", "content": "x"}]
    return [
        name for name in names if ANSWER.strip() in render(tokenizer, [*prompt, said | {name: ANSWER}], header=False)
    ]


def response_text(tokenizer, turn, prompt, response):
    """The text that follows prompt_text() for `response`, as the template renders the assistant's last message.

    response: a text, or a message that has reasoning beside its content.
    turn: assistant_turn()'s, without which the text is `response` itself. A <think> block that the response holds is
    rendered by the template's own rule. Where the rendered conversation does not begin with the rendered prompt (the
    header of DeepSeek-R1's templates opens a <think> block, and their last message has none), it is the response.
    """
    if turn is None:
        return response
    messages = as_messages(prompt)
    last = response if isinstance(response, dict) else {"role": "assistant", "content": response}
    whole = render(tokenizer, [*messages, last], header=False)
    before = render(tokenizer, messages)
    if whole.startswith(before) and whole.endswith(turn.closing):
        return whole[len(before) : len(whole) - len(turn.closing)]
    if isinstance(response, dict):
        raise InputError("the chat template does not render the reasoning after its own header; add --reasoning inline")
    return response.strip() if turn.strips else response


def end_token_id(tokenizer, template):
    """The id that ends a response: the special token that a template puts after an assistant's message, else eos."""
    if uses_chat(tokenizer, template):
        messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "@answer@"}]
        rest = encode(tokenizer, render(tokenizer, messages).split("@answer@")[-1])
        added = tokenizer.added_tokens_decoder  # also holds sentencepiece's user-defined pieces, which are plain text
        if rest and rest[0] in added and added[rest[0]].special:
            return rest[0]
    return tokenizer.eos_token_id


def mask_token_id(config, tokenizer, given=None):
    """The mask's id: `given` (--mask_token_id), else config.json's mask_token_id, else the tokenizer's mask_token.

    Where none of them is set, the family's mask token is looked up by its name among the tokenizer's tokens.
    """
    declared = getattr(config, "mask_token_id", None)
    if declared is not None and (type(declared) is not int or declared < 0):
        raise InputError(f"config.json: mask_token_id is {declared!r}, expected the id of a token")
    name = MASK_TOKENS.get(config.model_type, "")
    for found in (given, declared, tokenizer.mask_token_id, tokenizer.get_vocab().get(name)):
        if found is not None:
            return found
    raise InputError(
        f"the model names no mask token{name and f' {name}'}: give --mask_token_id, or set mask_token_id in its "
        "config.json"
    )


def prefix_ids(tokenizer, template):
    """Ids that the tokenizer puts before a text without a template, such as Llama's bos or BERT's [CLS]."""
    if uses_chat(tokenizer, template):
        return []
    full, bare = tokenizer("x")["input_ids"], encode(tokenizer, "x")
    place = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
    return full[:place]


def prompt_ids(tokenizer, prompt, template, opening=""):
    """The ids of prompt_text() and `opening`: what precedes a response, in training and in sampling."""
    text, prefix = prompt_text(tokenizer, prompt, template) + opening, prefix_ids(tokenizer, template)
    ids = encode(tokenizer, text)
    return ids if ids[: len(prefix)] == prefix else prefix + ids  # a text of lm_eval may begin with it already


def tokenizer_fingerprint(tokenizer):
    """Hex digest of vocabulary, special tokens, template, and of the ids of a probe text."""
    return fingerprint(
        sorted(tokenizer.get_vocab().items()),
        sorted(tokenizer.all_special_tokens),
        encode(tokenizer, PROBE),
        default_template(tokenizer),
    )
