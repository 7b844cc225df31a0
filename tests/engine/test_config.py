"""Config: every flag sets its field, all problems are reported at once, and an error's advice works."""

import dataclasses
import json
import re

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from engine import config
from engine.config import PRESETS, TrainConfig, batch_shape, parse
from engine.errors import BadInput

PROG = "gpt2 train"
quick = settings(deadline=None, max_examples=150)


# ---- Presets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_alone_is_a_whole_config(name):
    assert parse([name], PROG) == PRESETS[name]
    micro_batch_size, accumulation = batch_shape(PRESETS[name], 1)
    assert micro_batch_size * accumulation * PRESETS[name].sequence_length == PRESETS[name].tokens_per_step


# Learning rates of table 2.1 in Brown et al. 2020, in units of 1e-4; GPT-2's sizes take the nearest model's.
GPT3_LEARNING_RATES = {
    **{"gpt3-small": 6.0, "gpt3-medium": 3.0, "gpt3-large": 2.5, "gpt3-xl": 2.0},
    **{"gpt3-2.7b": 1.6, "gpt3-6.7b": 1.2, "gpt3-13b": 1.0, "gpt3-175b": 0.6},
    **{"gpt2": 6.0, "gpt2-medium": 3.0, "gpt2-large": 2.5, "gpt2-xl": 2.0},
}


def test_learning_rates_are_those_of_the_gpt3_paper():
    peaks = {name: preset.optim.lr for name, preset in PRESETS.items() if name.startswith("gpt")}
    assert peaks == {name: pytest.approx(lr * 1e-4) for name, lr in GPT3_LEARNING_RATES.items()}


def test_gpt2_trains_on_ten_billion_tokens():
    gpt2 = PRESETS["gpt2"]
    assert gpt2.tokens_per_step == 524_288
    assert abs(gpt2.num_steps * gpt2.tokens_per_step - 10e9) < gpt2.tokens_per_step


# ---- Command line -------------------------------------------------------------------------------------------------

FLAGS = [
    (["--data", "d"], {"data": "d"}),
    (["--out", "o"], {"out": "o"}),
    (["--num-steps", "7"], {"num_steps": 7}),
    (["--tokens-per-step", "2048"], {"tokens_per_step": 2048}),
    (["--micro-batch-size", "4"], {"micro_batch_size": 4}),
    (["--precision", "bf16"], {"precision": "bf16"}),
    (["--kernels", "torch"], {"kernels": "torch"}),
    (["--compile"], {"compile": True}),
    (["--no-compile"], {"compile": False}),
    (["--deterministic"], {"deterministic": True}),
    (["--parallel", "ddp"], {"parallel": "ddp"}),
    (["--seed", "9"], {"seed": 9}),
    (["--resume", "never"], {"resume": "never"}),
    (["--eval-every", "3"], {"eval_every": 3}),
    (["--save-every", "None"], {"save_every": None}),
    (["--log-every", "5"], {"log_every": 5}),
]


@pytest.mark.parametrize(("flags", "changes"), FLAGS, ids=lambda value: value[0] if isinstance(value, list) else "")
def test_a_flag_changes_its_field_and_no_other(flags, changes):
    assert parse(["tiny", *flags], PROG) == dataclasses.replace(PRESETS["tiny"], **changes)


def test_dotted_flags_reach_into_the_model_and_the_optimizer():
    tiny = PRESETS["tiny"]
    assert parse(["tiny", "--optim.lr", "3e-4", "--model.dropout", "0.1"], PROG) == dataclasses.replace(
        tiny,
        optim=dataclasses.replace(tiny.optim, lr=3e-4),
        model=dataclasses.replace(tiny.model, dropout=0.1),
    )


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        pytest.param(["tinny"], """must be one that exists, got 'tinny'; did you mean "tiny"?""", id="misspelt"),
        pytest.param(["gpt3-6.7"], 'did you mean "gpt3-6.7b"?', id="cut short"),
        pytest.param([], "a preset must come first, got nothing; choose from tiny, mini, small, gpt2,", id="none"),
        pytest.param(["--seed", "1"], "a preset must come first, got --seed", id="a flag in its place"),
    ],
)
def test_an_unknown_preset_is_told_the_nearest(args, sentence):
    with pytest.raises(BadInput, match=re.escape(sentence)):
        parse(args, PROG)


@pytest.mark.parametrize(
    ("flag", "known"),
    [("--num-step", "--num-steps"), ("--optim.lrr", "--optim.lr"), ("--micro-batch", "--micro-batch-size")],
)
def test_an_unknown_flag_exits_with_2_and_the_nearest(flag, known, capsys):
    with pytest.raises(SystemExit) as raised:
        parse(["tiny", flag, "3"], PROG)
    assert raised.value.code == 2
    output = capsys.readouterr().err
    assert flag in output
    assert re.search(rf"Perhaps you meant:\W+{known}\b", output)


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(["--num-steps", "many"], id="no number"),
        pytest.param(["--precision", "bf8"], id="no choice"),
        pytest.param(["--model.n-head", "7"], id="a width that heads do not divide"),
    ],
)
def test_a_value_of_the_wrong_kind_exits_with_2_and_names_the_flag(flags, capsys):
    with pytest.raises(SystemExit) as raised:
        parse(["tiny", *flags], PROG)
    assert raised.value.code == 2
    assert flags[0].removeprefix("--model.").replace("-", "_") in capsys.readouterr().err.replace("-", "_")


WRONG = {
    "--num-steps": "0",
    "--tokens-per-step": "-1",
    "--eval-tokens": "0",
    "--keep-last": "0",
    "--log-every": "0",
    "--sample-tokens": "0",
    "--micro-batch-size": "0",
    "--eval-every": "0",
    "--save-every": "-5",
    "--context": "129",  # of 128 positions
    "--seed": str(2**64),
    "--optim.lr": "nan",
    "--optim.min-lr-ratio": "1.5",
    "--optim.beta1": "1.0",
    "--optim.beta2": "-0.1",
    "--optim.clip": "nan",
    "--optim.eps": "0",
    "--optim.weight-decay": "nan",
    "--optim.warmup-tokens": "-1",
    "--prompt": "",
}


def test_all_problems_are_told_at_once():
    with pytest.raises(BadInput) as raised:
        parse(["tiny", *(word for pair in WRONG.items() for word in pair)], PROG)
    flags = re.findall(r"^(?:gpt2 train:)? *(--[a-z0-9.-]+) must .*, got", str(raised.value), re.MULTILINE)
    assert sorted(flags) == sorted(WRONG)


@pytest.mark.parametrize("flag", WRONG)
def test_each_problem_alone_is_one_sentence(flag):
    with pytest.raises(BadInput, match=f"^{PROG}: {flag} must [^\n]*, got [^\n]*$"):
        parse(["tiny", flag, WRONG[flag]], PROG)


# ---- The shape of a batch -----------------------------------------------------------------------------------------


def shaped(tokens_per_step: int, context: int, micro_batch_size: int | None) -> TrainConfig:
    return TrainConfig(tokens_per_step=tokens_per_step, context=context, micro_batch_size=micro_batch_size)


@quick
@given(
    context=st.integers(1, 1024),
    world_size=st.integers(1, 64),
    per_rank=st.integers(1, 600),
    wanted=st.none() | st.integers(1, 40),
)
@example(context=1024, world_size=8, per_rank=64, wanted=None)  # 16 at most
def test_the_parts_of_a_step_multiply_to_its_tokens(context, world_size, per_rank, wanted):
    assume(wanted is None or per_rank % wanted == 0)
    tokens = context * world_size * per_rank
    micro_batch_size, accumulation = batch_shape(shaped(tokens, context, wanted), world_size)
    assert context * micro_batch_size * accumulation * world_size == tokens
    if wanted is None:
        assert micro_batch_size == max(size for size in range(1, 17) if per_rank % size == 0)
    else:
        assert micro_batch_size == wanted


@quick
@given(
    tokens=st.integers(1, 100_000),
    context=st.sampled_from([1, 7, 32, 1000]),
    world_size=st.integers(1, 8),
    wanted=st.none() | st.integers(1, 40),
)
def test_the_values_that_an_error_advises_work(tokens, context, world_size, wanted):
    assume(tokens % (context * world_size * (wanted or 1)))
    with pytest.raises(BadInput) as raised:
        batch_shape(shaped(tokens, context, wanted), world_size)
    _, _, advice = str(raised.value).partition("; ")
    first, _, second = advice.partition(", the nearest --micro-batch-size ")
    steps, sizes = ([int(number) for number in re.findall(r"\d+", part)] for part in (first, second))
    assert steps
    assert bool(sizes) == (wanted is not None and tokens % (context * world_size) == 0)
    for advised in steps:
        batch_shape(shaped(advised, context, wanted), world_size)
        assert 0 < abs(advised - tokens) < context * world_size * (wanted or 1)
    for advised in sizes:
        batch_shape(shaped(tokens, context, advised), world_size)


# ---- File ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_a_config_survives_json(name, tmp_path):
    changed = dataclasses.replace(PRESETS[name], compile=False, micro_batch_size=3, init_from="x", prompt='"\u2028é\n')
    assert config.from_dict(json.loads(json.dumps(config.to_dict(changed)))) == changed
    later = config.to_dict(changed) | {"field_of_a_later_version": 1, "resolved": {}}
    later["optim"] |= {"momentum": 2}
    (tmp_path / "config.json").write_text(json.dumps(later))
    assert config.load(tmp_path) == config.load(str(tmp_path)) == changed


DAMAGED = [
    pytest.param(b"", id="empty"),
    pytest.param(b'{"data": "x", "mod', id="cut"),
    pytest.param(b"\xff\xfe\x00", id="no text"),
    pytest.param(b"{}", id="no model"),
    pytest.param(b"[]", id="a list"),
    pytest.param(b"null", id="nothing"),
    pytest.param(b'{"model": [], "optim": {}}', id="a list for a model"),
    pytest.param(b'{"model": {"n_layer": 0}, "optim": {}}', id="a model without layers"),
    pytest.param(b'{"model": {"n_layer": "2"}, "optim": {}}', id="a text for a number"),
]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_config_is_named(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(BadInput, match=r"config.json: must be the config of a run, got \w+"):
        config.load(tmp_path)


def test_a_directory_without_a_config_is_no_run(tmp_path):
    with pytest.raises(BadInput, match=r"must be a directory made by gpt2 train, with a config.json, got .*nowhere"):
        config.load(tmp_path / "nowhere")
