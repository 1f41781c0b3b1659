"""Text to token ids: prompt and responses of a row are encoded separately, and every response ends in the end token.

Nothing is truncated: a row that cannot be used as it is, is left out with a reason.
"""

import functools
import itertools
import json
import os
import re
import signal
import sys
from dataclasses import dataclass

import numpy as np

from cli import exits
from files import InputError
from models import architecture, families, tokenization
from preferences.messages import contents
from preferences.sources import LeftOut, Malformed

SMALL = 2000  # rows; below this, starting processes costs more than it saves
IDS = ("prompt", "chosen", "rejected")  # what the id lists of a row are called


@dataclass
class Encoder:
    """Makes a row's ids. Holds plain values alone, so that it can be sent to other processes."""

    tokenizer: object
    response_tokenizer: object
    template: str  # "chat" or "none"
    end: int
    mask: int
    special: re.Pattern  # the special tokens' strings
    turn: tokenization.Turn | None  # what the template puts around an answer
    max_length: int

    def __call__(self, prompt, responses):
        """[prompt, chosen, rejected], lists of ids; of an SFT row, rejected is empty. Raises LeftOut."""
        self.refuse_texts(contents(prompt), [contents(response) for response in responses])
        try:
            prompt_ids = tokenization.prompt_ids(self.tokenizer, prompt, self.template)
            texts = [tokenization.response_text(self.tokenizer, self.turn, prompt, each) for each in responses]
        except InputError as error:  # the template refuses this row's messages
            raise Malformed(str(error)) from None
        sides = [tokenization.encode(self.response_tokenizer, text) + [self.end] for text in texts]
        # a tokenizer that normalises text may read a special token where none was written: NFKC and full-width letters
        if self.mask in prompt_ids or any(self.mask in side or self.end in side[:-1] for side in sides):
            raise LeftOut("special token in the text", "as the tokenizer reads it")
        if len(sides) == 2 and sides[0] == sides[1]:
            raise LeftOut("chosen equals rejected", "")
        if (length := len(prompt_ids) + max(map(len, sides))) > self.max_length:
            raise LeftOut("too long", f"{length} tokens, of at most {self.max_length}")
        return [prompt_ids, *sides] if len(sides) == 2 else [prompt_ids, *sides, []]

    def refuse_texts(self, prompt_texts, responses):
        """Raise LeftOut for texts that are empty or spell a special token. responses: [text, reasoning...] of each."""
        if not "".join(prompt_texts).strip():
            raise LeftOut("empty prompt", "")
        blank = [name for name, texts in zip(("chosen", "rejected"), responses) if not texts[0].strip()]
        if blank:
            raise LeftOut("empty response", " and ".join(blank) if len(responses) == 2 else "")
        # the tokenizer would read it as the token: a mask, an end, a forged turn
        texts = itertools.chain(prompt_texts, *responses)
        if found := next(filter(None, map(self.special.search, texts)), None):
            raise LeftOut("special token in the text", found.group())


def make_encoder(args, model_args, tokenizer):
    """The Encoder of a model; args: DataArguments."""
    name, remote = model_args.model_name_or_path, model_args.trust_remote_code
    response_tokenizer = tokenization.response_tokenizer(name, tokenizer, remote)
    for each in (tokenizer, response_tokenizer):
        each.model_max_length = sys.maxsize  # no warning: rows that are too long are left out
    end = model_args.end_token_id
    if end is None:
        end = tokenization.end_token_id(tokenizer, args.template)
    model_config = architecture.load_config(name, remote)
    mask = tokenization.mask_token_id(model_config, tokenizer, model_args.mask_token_id)
    template, turn = "none", None
    if tokenization.uses_chat(tokenizer, args.template):
        template, turn = "chat", tokenization.assistant_turn(tokenizer)
    return Encoder(
        tokenizer,
        response_tokenizer,
        template,
        end,
        mask,
        special=special_pattern(tokenizer, {mask, end}),
        turn=turn,
        max_length=min(args.max_length, families.longest(model_config) or args.max_length),
    )


def special_pattern(tokenizer, ids):
    """A pattern of every string that the tokenizer reads as a special token, and of the tokens `ids`."""
    added = tokenizer.added_tokens_decoder
    texts = {str(token) for token in added.values() if token.special}
    for token in tokenizer.all_special_tokens:
        number = tokenizer.convert_tokens_to_ids(token)
        # this list also holds sentencepiece's user-defined pieces, such as a newline, which are plain text
        if number not in added or added[number].special:
            texts.add(token)
    texts |= {tokenizer.convert_ids_to_tokens(number) for number in ids if number < len(tokenizer)}
    return re.compile("|".join(re.escape(text) for text in sorted(texts - {None, ""}, key=len, reverse=True)))


def encode_rows(encoder, rows, num_proc):
    """Fill in the ids of each row, or the reason to leave it out. num_proc: processes; 0: one per core."""
    import datasets  # here, not above: it takes a second, and --reuse does not need it

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork
    if num_proc < 0:
        raise InputError(f"--num_proc {num_proc}: expected 0 (one per core) or more")
    num_proc = min(num_proc or (os.cpu_count() if len(rows) >= SMALL else 1), len(rows))
    if num_proc > 1:
        os.register_at_fork(after_in_child=functools.partial(end_with_us, os.getpid()))
    text = datasets.Value("string")
    columns = {"reason": text, "detail": text, **dict.fromkeys(IDS, datasets.List(datasets.Value("uint32")))}
    # Rows travel as JSON: arrow has no column type for "a string or messages". In memory: nothing in the home folder.
    table = datasets.Dataset.from_dict({"row": [json.dumps(row.parts) for row in rows]})
    table = table.map(
        encode_batch,
        batched=True,
        num_proc=num_proc if num_proc > 1 else None,
        remove_columns=["row"],
        fn_kwargs={"encoder": encoder},
        features=datasets.Features(columns),
        keep_in_memory=True,
        load_from_cache_file=False,
        new_fingerprint="packed",
        desc="tokenizing",
    )
    # In batches: row by row, handing the ids over takes longer than making them. The strings stay Python's.
    table = table.with_format("numpy", columns=list(IDS), output_all_columns=True)
    batches = (zip(*map(batch.get, columns)) for batch in table.iter(1000))
    encoded = itertools.chain.from_iterable(batches)
    for row, (reason, detail, *ids) in zip(rows, encoded, strict=True):
        row.leave_out(reason, detail)
        row.ids = tuple(part.astype(np.uint32) for part in ids)


def encode_batch(batch, encoder):
    """One batch of `datasets`: rows as JSON to columns of reasons, details and ids."""
    columns = {name: [] for name in ("reason", "detail", *IDS)}
    for text in batch["row"]:
        try:
            row = ("", "", *encoder(*json.loads(text)))
        except LeftOut as left_out:
            row = (*left_out.args, [], [], [])
        for column, value in zip(columns.values(), row):
            column.append(value)
    return columns


def end_with_us(parent):
    """In a process that was just forked off `parent`: end when that is killed, instead of waiting for it for ever."""
    if os.getppid() == parent:  # and not a fork of that process's own
        exits.when_the_parent_ends(signal.SIGKILL)


def refuse_ids_beyond(model_config, encoder, rows, name):
    """Refuse token ids that the model's embedding does not have."""
    embeddings = getattr(model_config, "embedding_size", None) or getattr(model_config, "vocab_size", sys.maxsize)
    largest = max(encoder.mask, *(int(ids.max()) for row in rows for ids in row.ids if len(ids)))
    if largest >= embeddings:
        raise InputError(
            f"{name}: token id {largest} is beyond the model's embedding of {embeddings} rows; "
            "its tokenizer and config.json do not belong together"
        )
