"""Tests of tokenization.py: templates, the ids of prompts and responses, the fingerprint.

bash tests/run.sh tests/models/test_tokenization.py
"""

import json
import shutil

import pytest
import sentencepiece
from new_tiny import ROLE_TEMPLATE, THINK_TEMPLATE
from originals import edit_json, refused
from prepared import HEADERS, TEMPLATE, with_template
from sentencepiece import sentencepiece_model_pb2

from files import InputError
from models import architecture, tokenization


def test_tokenizer_fingerprint(tiny_dir, chat):
    def of(change=lambda tokenizer: None, folder=tiny_dir):
        tokenizer = tokenization.load_tokenizer(str(folder))
        change(tokenizer)
        return tokenization.tokenizer_fingerprint(tokenizer)

    prints = [
        of(),
        of(lambda t: t.add_tokens(["<new>"])),
        of(lambda t: t.add_tokens(["7 + 5"], special_tokens=True)),
        of(lambda t: setattr(t, "chat_template", TEMPLATE)),
        of(lambda t: setattr(t, "chat_template", TEMPLATE + " ")),
        of(folder=chat),
    ]
    assert len(set(prints)) == len(prints) and prints[0] == of() and prints[-1] == of(folder=chat)


def test_mask_token_id(tiny_dir):
    tokenizer = tokenization.load_tokenizer(str(tiny_dir))
    config = architecture.load_config(str(tiny_dir))
    assert tokenization.mask_token_id(config, tokenizer) == 3
    config.mask_token_id = 0
    assert tokenization.mask_token_id(config, tokenizer) == 0  # config.json wins; 0 is an id
    for wrong in ("3", -1, True):
        config.mask_token_id = wrong
        refused(lambda: tokenization.mask_token_id(config, tokenizer), "config.json: mask_token_id is", repr(wrong))
    config.mask_token_id = None
    assert tokenization.mask_token_id(config, tokenizer) == 3
    tokenizer.mask_token = None
    refused(lambda: tokenization.mask_token_id(config, tokenizer), "mask_token_id")
    config.model_type = "illada"  # neither its config.json nor its tokenizer declares a mask: looked up by its name
    refused(lambda: tokenization.mask_token_id(config, tokenizer), "no mask token <[MASK]>: give --mask_token_id")
    tokenizer.add_tokens(["<[MASK]>"])
    assert tokenization.mask_token_id(config, tokenizer) == tokenizer.convert_tokens_to_ids("<[MASK]>") > 3
    assert tokenization.mask_token_id(config, tokenizer, given=7) == 7


@pytest.fixture(scope="module")
def chat(tiny_dir, tmp_path_factory):
    """The tiny tokenizer with LLaDA's template and special tokens."""
    folder = tmp_path_factory.mktemp("chat")
    for name in ("config.json", "tokenizer.model", "tokenizer_config.json"):
        shutil.copy(tiny_dir / name, folder)
    edit_json(
        folder / "tokenizer_config.json",
        chat_template=TEMPLATE,
        bos_token="<|startoftext|>",
        add_bos_token=True,
        additional_special_tokens=HEADERS,
    )
    return folder


def test_prompt_text(chat):
    tokenizer = tokenization.load_tokenizer(str(chat))
    header = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    want = "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n7 + 5?<|eot_id|>" + header
    for template in ("auto", "chat"):
        assert tokenization.prompt_text(tokenizer, " 7 + 5?\n", template) == want
    assert tokenization.prompt_text(tokenizer, " 7 + 5?\n", "none") == " 7 + 5?\n"
    talk = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant", "user")]
    text = tokenization.prompt_text(tokenizer, talk, "auto")
    assert text.count("assistant") == 2 and text.endswith("\n\nu<|eot_id|>" + header)

    ids = tokenization.encode(tokenizer, want)
    bos = "<|startoftext|>"
    name_of = {tokenizer.convert_tokens_to_ids(name): name for name in (bos, *HEADERS)}
    assert len(name_of) == 4
    got = [name_of.get(id) for id in ids]
    assert [name for name in got if name] == [bos, *HEADERS, *HEADERS[:2]]
    assert got[0] == bos and tokenizer.decode(ids) == want  # one bos, at the start


def test_prompt_text_without_template(tiny_dir, chat):
    tokenizer = tokenization.load_tokenizer(str(tiny_dir))
    assert tokenization.prompt_text(tokenizer, "7 + 5", "auto") == "7 + 5"
    refused(lambda: tokenization.prompt_text(tokenizer, "7 + 5", "chat"), "--template chat", "--template none")
    refused(lambda: tokenization.prompt_text(tokenizer, [{"role": "user", "content": "x"}], "auto"), "chat template")
    strict = tokenization.load_tokenizer(str(chat))
    strict.chat_template = "{{ raise_exception('users speak first') }}"
    refused(lambda: tokenization.prompt_text(strict, "x", "auto"), "users speak first")


def test_end_token_id(tiny_dir, chat):
    """The template's token after an answer, where it is a special one; else eos."""
    tokenizer, plain = (tokenization.load_tokenizer(str(folder)) for folder in (chat, tiny_dir))
    eot = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert [tokenization.end_token_id(tokenizer, template) for template in ("auto", "chat", "none")] == [eot, eot, 2]
    assert tokenization.end_token_id(plain, "auto") == 2 != eot
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"
    assert tokenization.end_token_id(tokenizer, "auto") == 2


def turn_of(tokenizer, template):
    tokenizer.chat_template = template
    return tokenization.assistant_turn(tokenizer)


TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]


@pytest.mark.parametrize(
    "template, opening, response, text",
    [
        (TEMPLATE, "", " 12 \n", "12"),
        (TEMPLATE, "", "<think>7 + 5</think>12", "<think>7 + 5</think>12"),  # not a template that knows thoughts
        (ROLE_TEMPLATE, "", " 12 ", " 12 "),
        (THINK_TEMPLATE, "<think>\n\n</think>\n\n", " 12 ", "<think>\n\n</think>\n\n 12 "),
        (THINK_TEMPLATE, "<think>\n\n</think>\n\n", "<think>7 + 5</think>\n12", "<think>\n7 + 5\n</think>\n\n12"),
    ],
)
@pytest.mark.parametrize("prompt", ["7 + 5?", TALK])
def test_response_text(chat, template, opening, response, text, prompt):
    """A response is what the template renders after the prompt, up to what ends a turn."""
    tokenizer = tokenization.load_tokenizer(str(chat))
    turn = turn_of(tokenizer, template)
    assert turn.opening == opening and turn.strips == (template == TEMPLATE)
    assert tokenization.response_text(tokenizer, turn, prompt, response) == text
    assert tokenization.response_text(tokenizer, None, prompt, response) == response  # no template
    messages = tokenization.as_messages(prompt)
    whole = tokenization.render(tokenizer, [*messages, {"role": "assistant", "content": response}], header=False)
    assert tokenization.prompt_text(tokenizer, prompt, "chat") + text + turn.closing == whole


def test_response_text_where_the_prompt_is_not_a_prefix(chat):
    """DeepSeek-R1's header opens a thought that the rendered conversation does not have: the response as it is."""
    tokenizer = tokenization.load_tokenizer(str(chat))
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    turn = turn_of(tokenizer, template + "{% if add_generation_prompt %}<assistant><think>{% endif %}")
    assert turn == ("", "", False)
    assert tokenization.response_text(tokenizer, turn, "x", " so</think> 12 ") == " so</think> 12 "


def test_roles_of_llada2(tiny_dir):
    """Its template's system turn, and <|role_end|>, not eos, at the end of a response."""
    special = ["<role>", "</role>", "<|role_end|>"]
    folder = with_template(tiny_dir, "roles", ROLE_TEMPLATE, special)
    tokenizer = tokenization.load_tokenizer(str(folder))
    header = "<role>SYSTEM</role>detailed thinking off<|role_end|><role>HUMAN</role>c<|role_end|><role>ASSISTANT</role>"
    assert tokenization.prompt_text(tokenizer, "c", "auto") == header
    system = [{"role": "system", "content": "s"}, {"role": "user", "content": "c"}]
    assert tokenization.prompt_text(tokenizer, system, "auto") == header.replace("detailed", "s\ndetailed", 1)
    assert tokenization.end_token_id(tokenizer, "auto") == tokenizer.convert_tokens_to_ids("<|role_end|>") != 2


def test_tokenizer_without_eos(tiny_dir, tmp_path):
    folder = shutil.copytree(tiny_dir, tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": None}))
    refused(lambda: tokenization.load_tokenizer(str(folder)), "eos_token")


@pytest.mark.parametrize("legacy", [True, False])
def test_response_tokenizer(shared, make_llada, tmp_path, legacy):
    """A response follows other text: the ids that sentencepiece gives when its dummy prefix is switched off.

    No two spaces in a row here: transformers 5.23 builds such pieces first, whatever score tokenizer.model gives them.
    """
    make_llada(tmp_path)
    model = shared / "tokenizers" / "llama_32k_tokenizer.model"
    shutil.copy(model, tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "LlamaTokenizer",
                "legacy": legacy,
                "eos_token": "</s>",
                "bos_token": "<s>",
                "unk_token": "<unk>",
            }
        )
    )
    tokenizer = tokenization.load_tokenizer(str(tmp_path))
    response = tokenization.response_tokenizer(str(tmp_path), tokenizer)
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model.read_bytes())
    golden = []
    for prefix in (True, False):
        proto.normalizer_spec.add_dummy_prefix = prefix
        golden.append(sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString()))
    for text in ("Hello world", "1,234 + 5 = 1239\n#### 1239", "\nx y", "é漢<x>"):
        assert tokenization.encode(tokenizer, text) == golden[0].encode(text) != golden[1].encode(text), text
        for follows in (text, " " + text):
            assert tokenization.encode(response, follows) == golden[1].encode(follows), follows


def test_response_tokenizer_of_tiny(tiny_dir, tmp_path):
    """No dummy prefix to begin with: the same object, digits one by one. With one: loaded again without it."""
    tokenizer = tokenization.load_tokenizer(str(tiny_dir))
    assert tokenization.response_tokenizer(str(tiny_dir), tokenizer) is tokenizer
    assert tokenizer.convert_ids_to_tokens(tokenization.encode(tokenizer, "1239")) == ["1", "2", "3", "9"]
    folder = shutil.copytree(tiny_dir, tmp_path / "prefixed")
    edit_json(folder / "tokenizer_config.json", add_prefix_space=True)
    prefixed = tokenization.load_tokenizer(str(folder))
    response = tokenization.response_tokenizer(str(folder), prefixed)
    assert prefixed.convert_ids_to_tokens(tokenization.encode(prefixed, "7 + 5")) == [
        "\u2581",
        "7",
        "\u2581+",
        "\u2581",
        "5",
    ]
    assert response.convert_ids_to_tokens(tokenization.encode(response, "7 + 5")) == ["7", "\u2581+", "\u2581", "5"]


def test_named_templates(chat):
    """One of several chat templates is taken if it is named default; else the sentence says what there is."""
    named = tokenization.load_tokenizer(str(chat))
    want = tokenization.prompt_text(named, "hi", "auto")
    named.chat_template = {"rag": "{{ messages }}", "default": named.chat_template}
    assert tokenization.prompt_text(named, "hi", "auto") == want != "hi"
    named.chat_template = {"tool_use": TEMPLATE, "rag": TEMPLATE}
    for template in ("auto", "chat"):
        with pytest.raises(InputError, match="chat templates for rag, tool_use and none named default"):
            tokenization.uses_chat(named, template)
    assert tokenization.tokenizer_fingerprint(named)
    assert tokenization.prompt_text(named, "hi", "none") == "hi"
