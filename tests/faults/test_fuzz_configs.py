"""Hostile --config_file and ds_config files: refused in one sentence that names the file, or read as they are written.

bash tests/run.sh tests/faults/test_fuzz_configs.py
"""

import copy
import gzip
import json
import os
import time
from dataclasses import fields

import pytest
import yaml
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small import ROOT, refusal

import config
import plan
import train_dpo
from cli.parser import number_or_auto
from files import InputError
from training import deepspeed_config

MANY = settings(
    max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 30))
SHIPPED = {path.stem: json.loads(path.read_text()) for path in sorted((ROOT / "ds_configs").glob("*.json"))}
TEXTS = st.text(st.characters(exclude_categories=()), max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | st.just("auto"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
)


def parse(argv):
    return config.parse(argv, "x", *config.GROUPS)


# --config_file


@pytest.mark.parametrize(
    "body, words",
    [
        ("max_step: 1", "unknown argument max_step; did you mean max_steps?"),
        ("max-steps: 1", "did you mean max_steps?"),
        ("config_file: other.yaml", "unknown argument config_file"),
        ("<<: {beta: 1}", "unknown argument <<"),
        ('"a\\nb": 1', "unknown argument 'a\\nb'"),
        ("'': 1", "unknown argument"),
        ("? [a]\n: b", "unhashable key"),
        ("seed: 1.5", "--seed: invalid int value: '1.5'"),
        ("seed: 1e3", "invalid int value"),
        ("beta: 1 2", "invalid float value"),
        ("trust_remote_code: maybe", "expected one of yes/no"),
        ("loss_type: ipoo", "no loss is called 'ipoo'"),
        ("diffusion_steps: many", "neither a number nor auto"),
        ("beta: [1]", "beta holds a list"),
        ("beta: {a: 1}", "beta holds a mapping"),
        ("beta: !!python/object/apply:os.system ['true']", "beta holds a list"),
        ("!!python/object/apply:os.system ['true']", "name: value"),
        ("beta: 1\nbeta: 2", "beta occurs twice"),
        ("'beta': 1\n\"beta\": 1", "beta occurs twice"),
        ("beta: {a: 1, a: 2}", "a occurs twice"),
        ("beta:\t1", "'\\t' that cannot start"),
        ("beta: 1\n\tseed: 2", "'\\t' that cannot start"),
        ("- beta", "name: value"),
        ("[]", "name: value"),
        ("just words", "name: value"),
        ("beta: 1\n---\nbeta: 2", "another document"),
        ("beta: *b", "undefined alias"),
        ("beta: &b [*b]", "recursive"),
        (LAUGHS, "unknown argument a0"),
        (LAUGHS.replace("a29:", "beta:"), "unknown argument a0"),
        ("beta: " + "[" * 2000, "recursion"),
        ("- " * 10**5, "recursion"),
        ("{" * 2000, "recursion"),
        ('data: "a\\0b"', "data is 'a\\x00b', expected one line"),
        ('data: "\\ud800"', "data is '\\ud800'"),
        ("data: |\n  a\n  b", "one line"),
        (b"\xff\xfeb\0", "can't decode byte 0xff"),
        (b"\0\1", "special characters are not allowed"),
        (b"\x89PNG\r\n", "can't decode"),
        ("beta: caf\u00e9".encode("latin-1"), "can't decode byte 0xe9"),
        (gzip.compress(b"beta: 1", mtime=0), "can't decode byte 0x8b"),
        ("beta: 1".encode("utf-16"), "can't decode"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_yaml(body, words, tmp_path, capsys):
    (tmp_path / "a.yaml").write_bytes(body if isinstance(body, bytes) else body.encode())
    began = time.process_time()
    said = refusal(parse, capsys, "--config_file", tmp_path / "a.yaml")
    assert (
        said.startswith(f"error: {tmp_path}/a.yaml: ")
        and words in said
        and len(said) < 500
        and time.process_time() - began < 60
    )


def test_laughs_as_a_value(tmp_path, capsys):
    """Ten to the power of 28 items, of which none may be written out."""
    (tmp_path / "a.yaml").write_text(LAUGHS.replace("\na", "\nb").replace("a0: &a0", "beta: &a0"))
    assert "beta holds a list, expected one value" in refusal(parse, capsys, "--config_file", tmp_path / "a.yaml")


@pytest.mark.parametrize(
    "body",
    [
        "",
        "\n \n",
        "# nothing",
        "---\n",
        "{}",
        "\ufeffbeta: 0.1\r\nseed: 42\r\n",
        "beta: &b 0.1\nadam_beta1: 0.9",
        "beta: !!float 0.1",
        "beta:",
        "beta: null\nseed: ~",
        "%YAML 1.1\n---\nbeta: 0.1",
    ],
)
def test_yaml_that_says_the_defaults(body, tmp_path):
    (tmp_path / "a.yaml").write_text(body)
    assert parse(["--config_file", str(tmp_path / "a.yaml")]) == parse([])


def test_yaml_that_is_no_file(tmp_path, capsys):
    (tmp_path / "folder.yaml").mkdir()
    for name, words in (
        ("folder.yaml", "Is a directory"),
        ("gone.yaml", "No such file"),
        ("x" * 300, "File name too long"),
    ):
        assert words in refusal(parse, capsys, "--config_file", tmp_path / name)
    (tmp_path / "mem.yaml").symlink_to("/proc/self/mem")
    assert "Input/output error" in refusal(parse, capsys, "--config_file", tmp_path / "mem.yaml")
    (tmp_path / "a.yaml").write_text("beta: 0.5")
    assert "given 2 times" in refusal(
        parse, capsys, "--config_file", tmp_path / "a.yaml", f"--config_file={tmp_path}/a.yaml"
    )
    assert parse(["--config_file", os.devnull]) == parse([])


@pytest.mark.parametrize(
    "body, words",
    [
        ("loss_type: sft\nsft_weight: 1", "leave it out with --loss_type sft"),
        ("loss_type: ipo\nlabel_smoothing: 0.1", "not ipo"),
        ("beta: .nan", "beta"),
        ("beta: nan", "--beta is nan"),
        ("learning_rate: 1e999", "--learning_rate is inf"),
        ("beta: " + "9" * 1000, "--beta is inf"),
        ("max_steps: 0\nnum_train_epochs: 0", "more than 0"),
    ],
)
def test_yaml_that_contradicts_itself(body, words, tmp_path, capsys):
    (tmp_path / "a.yaml").write_text(body)
    assert words in refusal(
        train_dpo.main, capsys, "--config_file", tmp_path / "a.yaml", "--output_dir", tmp_path / "run"
    )


def value_of(item):
    """A strategy of an argument's values: as many types as it takes."""
    options = getattr(item.type, "__args__", ())
    if item.type is number_or_auto:
        return st.integers() | st.just("auto")
    if item.type is float:
        return st.floats(allow_nan=False, allow_infinity=False)
    if item.type in (int, bool):
        return {int: st.integers(), bool: st.booleans()}[item.type]
    if options and all(isinstance(option, str) for option in options):
        return st.sampled_from(options)
    if int in options:
        return st.integers()
    ends_a_line = "\x85\u2028\u2029\ufeff"
    letters = st.characters(min_codepoint=32, exclude_categories=["Cs", "Cc", "Cn"], exclude_characters=ends_a_line)
    return st.text(letters, min_size=1).filter(lambda text: text not in ("null", "~"))


OTHERS = {"local_rank", "preference_data_path", "loss_type", "loss_weights"}  # lists, and texts of a form of their own
ARGUMENTS = {item.name: value_of(item) for group in config.GROUPS for item in fields(group) if item.name not in OTHERS}


@MANY
@given(values=st.fixed_dictionaries({}, optional=ARGUMENTS))
def test_what_is_written_is_read(values, tmp_path_factory):
    path = tmp_path_factory.mktemp("yaml") / "a.yaml"
    path.write_text(yaml.safe_dump(values, allow_unicode=True, width=10**6), encoding="utf-8")
    got = {name: value for group in parse(["--config_file", str(path)]) for name, value in vars(group).items()}
    assert {name: got[name] for name in values} == values


@MANY
@given(
    body=st.binary(max_size=60)
    | st.text(st.sampled_from("abeta: \n\t[]{}&*!|>'\"%@`-?,#0~."), max_size=40).map(str.encode)
    | st.dictionaries(st.sampled_from(["beta", "seed", "data"]) | TEXTS, JSON, max_size=3)
    .map(json.dumps)
    .map(str.encode)
)
def test_any_yaml(body, tmp_path_factory):
    path = tmp_path_factory.mktemp("yaml") / "a.yaml"
    path.write_bytes(body)
    try:
        parse(["--config_file", str(path)])
    except InputError as error:
        assert str(path) in str(error) and len(str(error).splitlines()) == 1


# ds_config


def places(section, path=()):
    """Every place of a ds_config: (keys, value)."""
    for key, value in section.items():
        yield (*path, key), value
        if isinstance(value, dict):
            yield from places(value, (*path, key))


def changed(section, path, change):
    """A copy in which change(parent, key) was called at `path`."""
    section = copy.deepcopy(section)
    parent = section
    for key in path[:-1]:
        parent = parent[key]
    change(parent, path[-1])
    return section


def renaming(name):
    def change(parent, key):
        parent[name] = parent.pop(key)

    return change


def setting(value):
    def change(parent, key):
        parent[key] = value

    return change


def refused(tmp_path, section, *words):
    path = tmp_path / "ds.json"
    path.write_text(section if isinstance(section, str) else json.dumps(section))
    with pytest.raises(InputError) as error:
        deepspeed_config.read_ds_config(path)
    said = str(error.value)
    assert said.startswith(f"{path}: ") and all(word in said for word in words) and len(said.splitlines()) == 1, said
    return said


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_and_every_misspelt_key(name, tmp_path):
    assert deepspeed_config.read_ds_config(ROOT / "ds_configs" / f"{name}.json") == SHIPPED[name]
    for path, _ in places(SHIPPED[name]):
        for wrong in (path[-1][:-1] + "_x", path[-1].upper() + "S", "no_such_thing"):
            section = changed(SHIPPED[name], path, renaming(wrong))
            said = refused(tmp_path, section, f'"{".".join((*path[:-1], wrong))}"')
            assert wrong != path[-1][:-1] + "_x" or len(path[-1]) < 4 or "did you mean" in said


@pytest.mark.parametrize("name", SHIPPED)
def test_every_wrong_type(name, tmp_path):
    for path, value in places(SHIPPED[name]):
        wrong = {
            bool: ["yes", "true", 1, 0.5, None, [], {}],
            int: ["3", True, 0.5, None, [], {}],
            float: ["1e-8", True, None, [], {}],
            dict: [[], 3, "x", True, None],
            str: [[], {}],
        }[type(value)]
        for each in wrong:
            if each is None and path[-1] in ("overlap_comm", "offload_param", "offload_optimizer"):
                continue  # which may be null
            refused(tmp_path, changed(SHIPPED[name], path, setting(each)), ".".join(path))


@pytest.mark.parametrize(
    "section, words",
    [
        ({"stage": "3"}, 'zero_optimization.stage is "3", expected 0, 1, 2 or 3'),
        ({"stage": True}, "stage is true"),
        ({"stage": 4}, "stage is 4"),
        ({"stage": "auto"}, 'stage is "auto", which the run does not decide; write 0, 1, 2 or 3'),
        ({}, "stage is None"),
        ([], "zero_optimization is [], expected an object"),
        (3, "expected an object"),
        ({"stage": 3, "offload_param": {"device": "gpu"}}, "expected 'none', 'cpu' or 'nvme'"),
        (
            {"stage": 3, "offload_param": {"device": "cpu", "pin_memory": "yes"}},
            'offload_param.pin_memory is "yes", expected a valid boolean',
        ),
        ({"stage": 3, "offload_parm": {}}, '"zero_optimization.offload_parm"; did you mean offload_param?'),
        ({"stage": 3, "offload_optimizer": {"fast_int": True}}, "did you mean fast_init?"),
        ({"stage": 3, "reduce_bucket_size": 0}, "greater than 0"),
        ({"stage": 3, "offload_optimizer": {"ratio": 1.5}}, "less than or equal to 1"),
        ({"stage": 3, "cpu_offload": True}, "write offload_optimizer"),
        ({"stage": 2, "offload_param": {"device": "cpu"}}, "offload_param needs stage 3"),
        ({"stage": 0, "offload_optimizer": {"device": "cpu"}}, "offload_optimizer needs stage 1"),
        ({"stage": 3, "prefetch_bucket_size": 5, "stage3_prefetch_bucket_size": 6}, "prefetch_bucket_size"),
        ({"stage": 3, "compute_grad_norm": False}, "zero_optimization.compute_grad_norm false is not supported"),
        (
            {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.5}},
            "Partial offloading only supported for ZeRO Stage 3",
        ),
    ],
)
def test_zero(section, words, tmp_path):
    refused(tmp_path, {"zero_optimization": section}, words)


@pytest.mark.parametrize(
    "more, words",
    [
        ({"scheduler": {"params": {"warmup_steps": 3}}}, "did you mean warmup_num_steps?"),
        ({"train_batch_sise": 8}, "did you mean train_batch_size?"),
        ({"optimizer": {"params": {"max_grad_norm": 1}}}, '"optimizer.params.max_grad_norm"'),
        ({"optimizer": []}, "optimizer is []"),
        ({"optimizer": {"params": {"lr": "1e-4"}}}, "valid number"),
        ({"optimizer": {"params": {"betas": [0.9, "x"]}}}, "betas is [0.9"),
        ({"optimizer": {"params": {"beta": 1}}}, "did you mean betas?"),
        ({"bf16": True}, "bf16 is true, expected an object"),
        ({"bf16": {"bf16_optimizer_states": True}}, "needs bf16.bf16_master"),
        ({"fp16": {"enabled": True}}, "fp16 is not supported"),
        ({"gradient_clipping": float("nan")}, "NaN is not a number"),
        ({"gradient_clipping": float("inf")}, "Infinity is not a number"),
        ({"aio": 3}, "aio is 3, expected an object"),
        ({"a\nb\ud800": 1}, 'unknown key "a\\nb\\ud800"'),
    ],
)
def test_top(more, words, tmp_path):
    refused(tmp_path, {"zero_optimization": {"stage": 3}} | more, words)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "{",
        "[" * 10**5,
        '{"a":' * 10**5,
        "// comment\n{}",
        "{'bf16': {}}",
        '{"bf16": {},}',
        '{"gradient_clipping": ' + "9" * 5000 + "}",
        '{"bf16": {}, "bf16": {}}',
        '{"zero_optimization": {"stage": 2, "stage": 3}}',
        "[]",
        "null",
        "7",
        '"x"',
        '{"gradient_clipping": 1e999}',
    ],
    ids=lambda text: text[:20],
)
def test_no_json(text, tmp_path):
    refused(tmp_path, text)


def test_bytes_that_are_no_ds_config(tmp_path, capsys):
    for body in (
        b"\xff\xfe\0",
        b"\x89PNG\r\n",
        gzip.compress(b"{}", mtime=0),
        json.dumps(SHIPPED["zero0"]).encode("utf-16"),
    ):
        (tmp_path / "ds.json").write_bytes(body)
        with pytest.raises(InputError, match="ds.json: cannot be read as JSON"):
            deepspeed_config.read_ds_config(tmp_path / "ds.json")
    (tmp_path / "ds.json").write_bytes(
        b"\xef\xbb\xbf" + json.dumps(SHIPPED["zero0"], indent=1).replace("\n", "\r\n").encode()
    )
    assert deepspeed_config.read_ds_config(tmp_path / "ds.json") == SHIPPED["zero0"]
    with pytest.raises(InputError, match="Is a directory"):
        deepspeed_config.read_ds_config(tmp_path)
    (tmp_path / "ds.json").write_text('{"zero_optimisation": {}}')
    argv = ["--model_name_or_path", ROOT / "examples" / "tiny", "--deepspeed", tmp_path / "ds.json"]
    assert 'unknown key "zero_optimisation"; did you mean zero_optimization?' in refusal(plan.main, capsys, *argv)


def test_deepspeeds_own_names_pass(tmp_path):
    """Every field of its ZeRO model that is not deprecated, under its name and its alias, with its default."""
    for own, field in DeepSpeedZeroConfig.model_fields.items():
        for name in {own, field.alias} - {None, "stage"}:
            if not (field.json_schema_extra or {}).get("deprecated") and isinstance(
                field.default, (bool, int, type(None))
            ):
                (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3, name: field.default}}))
                deepspeed_config.read_ds_config(tmp_path / "ds.json")
    (tmp_path / "ds.json").write_text(
        json.dumps({"zero_optimization": {"stage": 3, "stage3_max_live_parameters": 1e9}})
    )
    assert (
        deepspeed_config.read_ds_config(tmp_path / "ds.json")["zero_optimization"]["stage3_max_live_parameters"] == 1e9
    )


@MANY
@given(place=st.sampled_from([(name, path) for name in SHIPPED for path, _ in places(SHIPPED[name])]), value=JSON)
def test_any_value_anywhere(place, value, tmp_path_factory):
    """It is refused, or DeepSpeed's own model takes it."""
    name, path = place
    section = changed(SHIPPED[name], path, setting(value))
    file = tmp_path_factory.mktemp("ds") / "ds.json"
    file.write_text(json.dumps(section))
    try:
        read = deepspeed_config.read_ds_config(file)
    except InputError as error:
        assert str(error).startswith(f"{file}: ") and len(str(error).splitlines()) == 1
    else:
        assert read == section
        DeepSpeedZeroConfig(**read["zero_optimization"])
