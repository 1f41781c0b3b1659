"""Tokenizers: load, fingerprint, chat templates, the ids of a prompt and of a response."""

import jinja2
import transformers
from transformers import AutoTokenizer

from files import InputError, fingerprint, read_json
from models import families
from models.architecture import load_config
from models.folders import model_folder


def load_tokenizer(name, trust_remote_code=False, **kwargs):
    """The folder's tokenizer through AutoTokenizer (tokenizer.json, or a sentencepiece tokenizer.model)."""
    folder = model_folder(name)
    load_config(name, trust_remote_code)
    if (folder / "tokenizer.model").exists() and not (folder / "tokenizer_config.json").exists():
        raise InputError(
            f"{folder}: its tokenizer.model needs a tokenizer_config.json beside it that names tokenizer_class "
            "(LlamaTokenizer for SMDM), or it would be read wrongly"
        )
    try:
        told = (
            read_json(folder / "tokenizer_config.json", "downloading the model again")
            if (folder / "tokenizer_config.json").exists()
            else {}
        )
        if same := families.TOKENIZERS.get(told.get("tokenizer_class")):
            tokenizer = getattr(transformers, same).from_pretrained(folder, **kwargs)
        else:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, **kwargs)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise InputError(f"{folder}: its tokenizer cannot be loaded ({' '.join(str(error).split())[:200]})") from None
    if tokenizer.eos_token_id is None and tokenizer.sep_token_id is not None:
        tokenizer.eos_token = tokenizer.sep_token  # BERT's and its kin: what ends a text
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
    """The text that precedes a response: the raw string, or its rendering up to and with the assistant's header.

    prompt: a string (in a chat, one user message) or a list of {"role", "content"} messages, which needs a template.
    It holds every special token that it should: encode it with nothing added.
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
    """What ends a response: the special token that the chat template puts after an assistant's message, else eos."""
    if uses_chat(tokenizer, template):
        messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "@answer@"}]
        rest = encode(tokenizer, render(tokenizer, messages).split("@answer@")[-1])
        added = tokenizer.added_tokens_decoder  # it holds sentencepiece's user-defined pieces too, which are plain text
        if rest and rest[0] in added and added[rest[0]].special:
            return rest[0]
    return tokenizer.eos_token_id


def mask_token_id(config, tokenizer, given=None):
    """The mask's id: `given` (--mask_token_id), else config.json's mask_token_id, else the tokenizer's mask_token; never guessed."""
    found = given if given is not None else getattr(config, "mask_token_id", None)
    found = tokenizer.mask_token_id if found is None else found
    if found is None:
        raise InputError("the model names no mask token: give --mask_token_id, or set mask_token_id in its config.json")
    return int(found)


def prefix_ids(tokenizer, template):
    """Ids that the tokenizer puts before a text that no template renders, such as Llama's bos or BERT's [CLS]."""
    if uses_chat(tokenizer, template):
        return []
    whole, bare = tokenizer("x")["input_ids"], encode(tokenizer, "x")
    place = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return whole[:place]


def prompt_ids(tokenizer, prompt, template):
    """The ids of prompt_text(): what comes before a response, in training and in sampling alike."""
    ids, prefix = encode(tokenizer, prompt_text(tokenizer, prompt, template)), prefix_ids(tokenizer, template)
    return ids if ids[: len(prefix)] == prefix else prefix + ids  # a text of lm_eval's may hold it already


def tokenizer_fingerprint(tokenizer):
    """Vocabulary, special tokens, template, and how a probe text is cut (merges and normalisation show there)."""
    probe = encode(tokenizer, "A probe: 1234 + 5 = 1,239\n\n  caf\u00e9 \u6f22\u5b57 <x>\t'quoted'")
    return fingerprint(
        sorted(tokenizer.get_vocab().items()),
        sorted(tokenizer.all_special_tokens),
        probe,
        tokenizer.get_chat_template() if tokenizer.chat_template else None,
    )
