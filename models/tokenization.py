"""Tokenizers: load, fingerprint, chat templates, the ids of a prompt and of a response."""

import jinja2
import transformers
from transformers import AutoTokenizer

from files import InputError, fingerprint, read_json
from models.architecture import load_config
from models.families import TOKENIZERS
from models.folders import model_folder

PROBE = "A probe: 1234 + 5 = 1,239\n\n  caf\u00e9 \u6f22\u5b57 <x>\t'quoted'"  # shows merges and normalisation


def load_tokenizer(name, trust_remote_code=False, **kwargs):
    """The folder's tokenizer through AutoTokenizer (tokenizer.json, or a sentencepiece tokenizer.model)."""
    folder = model_folder(name)
    load_config(name, trust_remote_code)  # refuses a model that cannot be loaded; AutoTokenizer reads the config, too
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
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, **kwargs)
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
    if template == "chat" and not tokenizer.chat_template:
        raise InputError("--template chat: this tokenizer has no chat template; use --template none")
    return template != "none" and bool(tokenizer.chat_template)


def prompt_text(tokenizer, prompt, template):
    """The text that precedes a response: the raw string, or its rendering up to and including the assistant's header.

    prompt: a string (in a chat, one user message) or a list of {"role", "content"} messages, which needs a template.
    The text contains all special tokens that it needs, so encode it with nothing added.
    """
    if not uses_chat(tokenizer, template):
        if isinstance(prompt, str):
            return prompt
        raise InputError("conversational rows need a chat template, and this tokenizer has none (or --template none)")
    return render(tokenizer, [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)


def render(tokenizer, messages):
    """The chat template's text of `messages`, then the assistant's header."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except jinja2.TemplateError as error:
        raise InputError(f"the chat template refuses these messages ({error})") from None


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
    """The mask's id: `given` (--mask_token_id), else config.json's mask_token_id, else the tokenizer's mask_token."""
    for found in (given, getattr(config, "mask_token_id", None), tokenizer.mask_token_id):
        if found is not None:
            return int(found)
    raise InputError("the model names no mask token: give --mask_token_id, or set mask_token_id in its config.json")


def prefix_ids(tokenizer, template):
    """Ids that the tokenizer puts before a text without a template, such as Llama's bos or BERT's [CLS]."""
    if uses_chat(tokenizer, template):
        return []
    full, bare = tokenizer("x")["input_ids"], encode(tokenizer, "x")
    place = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
    return full[:place]


def prompt_ids(tokenizer, prompt, template):
    """The ids of prompt_text(): what precedes a response, in training and in sampling."""
    ids, prefix = encode(tokenizer, prompt_text(tokenizer, prompt, template)), prefix_ids(tokenizer, template)
    return ids if ids[: len(prefix)] == prefix else prefix + ids  # a text of lm_eval may begin with it already


def tokenizer_fingerprint(tokenizer):
    """Hex digest of vocabulary, special tokens, template, and of the ids of a probe text."""
    return fingerprint(
        sorted(tokenizer.get_vocab().items()),
        sorted(tokenizer.all_special_tokens),
        encode(tokenizer, PROBE),
        tokenizer.get_chat_template() if tokenizer.chat_template else None,
    )
