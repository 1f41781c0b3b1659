"""What the tests of data_prep.py share: rows, templates, what a pair says."""

import json
import shutil

import pytest

from files import InputError
from models import tokenization

# LLaDA's own: bos once, contents trimmed, and the assistant's header always at the end
TEMPLATE = (
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
HEADERS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
GOOD = {"prompt": "Question: how many?\nAnswer:", "chosen": " 7 + 5 = 12\n#### 12", "rejected": " 7 + 5 = 11\n#### 11"}
HH = "\n\nHuman: Two  pens?\n\nAssistant: Yes.\n\nHuman: And more?\n\nAssistant:"


def with_template(tiny_dir, name, template, special=HEADERS):
    folder = tiny_dir.parent / name
    folder.mkdir()
    shutil.copy(tiny_dir / "tokenizer.model", folder)
    for file, change in (
        ("tokenizer_config.json", {"chat_template": template, "additional_special_tokens": special}),
        ("config.json", {"vocab_size": 520, "embedding_size": 520}),
    ):
        (folder / file).write_text(json.dumps(json.loads((tiny_dir / file).read_text()) | change))
    return folder


def write_rows(path, rows):
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def texts(model, got, index=0):
    """Prompt, chosen, rejected of a pair as text, special tokens visible."""
    tokenizer = tokenization.load_tokenizer(str(model))
    return [tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False) for ids in got[index]]


def refuses(prep, sentence, *args, **kwargs):
    with pytest.raises(InputError) as caught:
        prep(*args, **kwargs)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
