"""--config and --print-config: a file of settings is between the preset and the flags, and survives a round trip."""

import dataclasses
import json
import os
import shutil
import tomllib
import types
from typing import Any, Literal, get_args, get_origin

import pytest
import runs
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import PRESETS, OptimConfig, TrainConfig, file, parse, to_dict, toml
from engine.errors import BadInput
from model.presets import GPT2Config

PROG = "gpt2 train"


@pytest.fixture
def write(tmp_path):
    """A function that writes a file of settings and returns its path."""

    def write(text: str | bytes, name: str = "mine.toml") -> str:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


# ---- Round trip ---------------------------------------------------------------------------------------------------

TEXTS = st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: text != "None")


def values(kind: Any) -> st.SearchStrategy:
    """Any value of a field's type that 64 bits hold."""
    if get_origin(kind) is types.UnionType:
        return st.one_of(*map(values, get_args(kind)))
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    floats = st.floats(allow_nan=False, allow_infinity=False)
    integers = st.integers(-(2**63) + 1, 2**63 - 1)
    return {str: TEXTS, int: integers, float: floats, bool: st.booleans(), type(None): st.none()}[kind]


def built(kind: type, **parts: st.SearchStrategy) -> st.SearchStrategy:
    fields = {each.name: values(each.type) for each in dataclasses.fields(kind) if each.name not in parts}
    return st.builds(kind, **fields, **parts)


SIZES = {name: st.integers(1, 2**62) for name in ("n_layer", "n_positions", "vocab_size", "n_embd")}
MODELS = built(GPT2Config, **SIZES, n_head=st.just(1), dropout=st.floats(0, 0.99))
CONFIGS = built(TrainConfig, model=MODELS, optim=built(OptimConfig))


@given(config=CONFIGS, base=st.sampled_from([*PRESETS.values()]))
@settings(deadline=None, max_examples=25)
def test_every_setting_survives_toml_over_any_preset(config, base):
    printed = toml.dump(config, PROG)
    preset, found = toml.parse(printed.encode())
    assert preset is None
    assert found.keys() == toml.FIELDS.keys()
    assert toml.applied(found, base) == config


@pytest.mark.parametrize("preset", ["tiny", "gpt2"])
def test_what_is_printed_is_the_same_config_and_prints_the_same(preset, write, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--eval-every", "None", "--no-compile", "--optim.lr", "3e-4", "--prompt", 'a "b" \\ é\n']
    assert runs.run("train", preset, *flags, "--print-config") == 0
    printed = capfd.readouterr().out
    assert list(tmp_path.iterdir()) == []
    mine = write(printed)
    assert parse(["--config", mine], PROG) == parse([preset, *flags], PROG)
    assert parse(["mini", "--config", mine], PROG) == parse([preset, *flags], PROG)
    assert runs.run("train", f"--config={mine}", "--print-config") == 0
    assert capfd.readouterr().out == printed
    assert all(len(line) <= 80 for line in printed.splitlines())


def test_only_the_first_process_of_torchrun_prints(capfd, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert runs.run("train", "tiny", "--print-config") == 0
    assert capfd.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    assert runs.run("train", "tiny", "--print-config") == 0
    assert "# 834,432 parameters, 778,240 tokens in 760 steps." in capfd.readouterr().out


def test_a_text_that_toml_cannot_hold_is_a_sentence(capfd):
    assert runs.run("train", "tiny", "--print-config", "--prompt", "\udcff") == 2
    assert "--print-config needs settings of valid text, got '\\udcff' in prompt" in capfd.readouterr().err


# ---- Who wins -----------------------------------------------------------------------------------------------------


def test_a_flag_wins_over_the_file_and_the_file_over_the_preset(write):
    mine = write('num-steps = 5\nseed = 7\nsave_every = "None"\noptim.lr = 1\n[model]\nn-layer = 2\n')
    tiny = PRESETS["tiny"]
    asked = parse(["tiny", "--seed", "8", "--config", mine], PROG)
    optim, model = dataclasses.replace(tiny.optim, lr=1.0), dataclasses.replace(tiny.model, n_layer=2)
    assert asked == dataclasses.replace(tiny, num_steps=5, seed=8, save_every=None, optim=optim, model=model)
    assert parse(["tiny", "--config", write('micro-batch-size = "auto"', "auto.toml")], PROG).micro_batch_size is None
    named = write('preset = "mini"\nseed = 7\n', "named.toml")
    assert parse(["--config", named], PROG) == dataclasses.replace(PRESETS["mini"], seed=7)
    assert parse(["tiny", "--config", named], PROG) == dataclasses.replace(tiny, seed=7)
    assert parse(["tiny", "--config", mine, "--config", named], PROG).seed == 7  # the last one counts, alone


def test_a_recipe_changes_the_preset_and_a_file_or_a_flag_changes_it_again(write):
    gpt2, fast = PRESETS["gpt2"], parse(["gpt2", "--recipe", "fast"], PROG)
    assert (fast.optim.name, fast.optim.schedule, fast.num_steps) == ("muon", "wsd", gpt2.num_steps // 2)
    assert (fast.model, fast.tokens_per_step, fast.data) == (gpt2.model, gpt2.tokens_per_step, gpt2.data)
    medium = parse(["gpt2-medium", "--recipe=fast"], PROG).optim
    assert medium.lr == pytest.approx(fast.optim.lr / 2)  # as the presets' own
    assert medium.muon_lr == fast.optim.muon_lr
    named = write('preset = "gpt2"\n[optim]\nlr = 1\n')
    asked = parse(["--config", named, "--recipe", "fast", "--num-steps", "7"], PROG)
    assert (asked.optim, asked.num_steps) == (dataclasses.replace(fast.optim, lr=1.0), 7)
    for preset in ("tiny", "mini", "small"):  # whose own it is
        assert parse([preset, "--recipe", "fast"], PROG) == PRESETS[preset]
    everything = write(toml.dump(PRESETS["tiny"], PROG).replace('preset = "', '# "'), "all.toml")
    with pytest.raises(BadInput, match=r"--recipe must go with a preset, got every setting from .*all\.toml"):
        parse(["--config", everything, "--recipe", "fast"], PROG)


def test_the_fast_recipe_of_gpt2_is_the_one_in_docs_learning_md():
    fast = parse(["gpt2", "--recipe", "fast"], PROG)
    assert (fast.num_steps, fast.tokens_per_step) == (9536, 524_288)
    assert (fast.optim.muon_lr, fast.optim.muon_momentum) == (0.02, 0.95)
    assert fast.optim.lr == pytest.approx(1.8e-3, rel=1e-12)
    assert (fast.optim.schedule, fast.optim.decay_share, fast.optim.min_lr_ratio) == ("wsd", 0.7, 0.0)


@pytest.mark.parametrize("ours", [["gpt2"], ["tiny"], ["gpt2", "--config", "file"]], ids=" ".join)
def test_the_fast_recipe_without_muon_is_refused(write, ours):
    adamw = ["--optim.name", "adamw"]
    if "--config" in ours:
        ours, adamw = [*ours[:2], write(toml.dump(PRESETS["gpt2"], PROG))], []
    with pytest.raises(BadInput, match=r"--recipe fast must go with --optim\.name muon, got adamw; leave one of them"):
        parse([*ours, "--recipe", "fast", *adamw], PROG)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("gpt2 --optim.muon-lr 0.02", "--optim.muon-lr has no effect: it needs --optim.name muon, got adamw"),
        ("gpt2 --optim.muon_momentum=0", "--optim.muon-momentum has no effect: it needs --optim.name muon, got adamw"),
        ("gpt2 --optim.decay-share 1", "--optim.decay-share has no effect: it needs --optim.schedule wsd, got cosine"),
        ("gpt2 --shard-size 2", "--shard-size has no effect: it needs --parallel hsdp, got ddp"),
        ("gpt2 --optim.no-muon-rows", "--optim.no-muon-rows has no effect: it needs --optim.name muon, got adamw"),
        ("gpt2 --no-reshard", "--no-reshard has no effect: it needs --parallel fsdp or hsdp, got ddp"),
        ("tiny --recipe fast", "--recipe fast has no effect: it is for presets with AdamW, and tiny has Muon"),
        ("tiny --optim.name adamw", None),  # nobody gave the rate of Muon that the preset has
        ("gpt2 --recipe fast --optim.muon-lr 0.02 --optim.decay-share 1", None),
        ("gpt2 --parallel hsdp --shard-size 2 --no-reshard", None),
    ],
)
def test_a_flag_without_effect_is_said_once(words, said, monkeypatch):
    lines = []
    parse(words.split(), PROG, lines.append)
    assert lines == ([] if said is None else [f"{PROG}: {said}"])
    monkeypatch.setenv("RANK", "1")
    parse(words.split(), PROG, lambda line: pytest.fail(f"the second process said {line}"))


def test_train_says_a_flag_without_effect_once_and_goes_on(capsys):
    assert runs.run("train", "gpt2", "--data", "no/such/data", "--optim.muon-lr", "0.03") == 2
    said = capsys.readouterr().err
    assert said.count("--optim.muon-lr has no effect") == 1
    assert "no/such/data" in said  # what the run says next


def test_a_windows_editor_s_file_is_read(write):
    assert parse(["tiny", "--config", write(b"\xef\xbb\xbfseed = 0x7\r\n")], PROG).seed == 7


def test_weights_give_their_sizes_over_a_run_s_and_a_toml_that_disagrees_is_refused(trained, tmp_path, write):
    out = ["--out", str(tmp_path / "new")]
    (tmp_path / "config.json").write_text(json.dumps(to_dict(PRESETS["mini"])))
    theirs = parse(["--config", str(tmp_path), *out, "--init-from", str(trained)], PROG).model
    assert (theirs.n_layer, theirs.n_embd) == (2, 64)
    lines = f'init_from = "{trained}"\n[model]\nn_layer = '
    assert parse(["mini", "--config", write(f"{lines}2"), *out], PROG).model.n_embd == 64
    with pytest.raises(BadInput, match=r"--model\.n-layer must be that of the weights in --init-from .*, 2, got 3"):
        parse(["mini", "--config", write(f"{lines}3"), *out], PROG)


# ---- A run's config.json ------------------------------------------------------------------------------------------


def test_a_run_s_config_starts_the_same_run_elsewhere_to_the_bit(trained, tmp_path, capfd):
    copied = str(shutil.copy(trained / "config.json", tmp_path / "c.json"))
    again = ["train", "--config", copied, "--out", str(tmp_path / "again")]
    assert runs.run(*again) == 0
    runs.assert_same_run(trained, tmp_path / "again")
    assert runs.run(*again) == 0
    assert "this run is complete" in capfd.readouterr().out


def test_how_a_run_went_on_is_not_carried_over_and_its_directory_must_be_named_anew(trained, tmp_path):
    fields = json.loads((trained / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"resume": "never", "resume_changed": True}))
    out = str(tmp_path / "new")
    asked = parse(["--config", str(tmp_path), f"--out={out}"], PROG)
    assert asked == dataclasses.replace(file.load(trained), out=out)
    assert (asked.resume, asked.resume_changed) == ("auto", False)
    for flags in ([], ["tiny"], ["--print-config"]):
        with pytest.raises(BadInput, match=f"--out must be given with the config of the run {tmp_path}, which has"):
            parse([*flags, "--config", str(tmp_path)], PROG)


def test_a_preset_of_another_model_than_the_run_s_is_refused_and_the_run_s_own_changes_nothing(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(to_dict(dataclasses.replace(PRESETS["tiny"], seed=5))))
    flags = ["--config", str(tmp_path), "--out", str(tmp_path / "new")]
    assert parse(["tiny", *flags], PROG) == parse(flags, PROG)
    with pytest.raises(BadInput, match=r"own, got gpt2 and .* of another model; leave out gpt2 or --config"):
        parse(["gpt2", *flags], PROG)


def test_a_config_of_another_version_is_read(trained, tmp_path):
    fields = json.loads((trained / "config.json").read_text())
    fields |= {"of_a_later_version": 1}
    fields["optim"] |= {"momentum": 2}
    del fields["async_save"], fields["optim"]["eps"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    out = str(tmp_path / "new")
    assert parse(["--config", str(tmp_path), "--out", out], PROG) == dataclasses.replace(file.load(trained), out=out)


@pytest.mark.slow
def test_torchrun_takes_the_file_and_prints_it_once(trained, shards, tmp_path, write, monkeypatch):
    mine = write('preset = "tiny"\nseed = 3\n')
    done = runs.torchrun(2, tmp_path / "run", shards, "--config", mine, "--print-config")
    assert done.returncode == 0, done.stderr
    assert tomllib.loads(done.stdout)["seed"] == 3
    monkeypatch.setattr(runs, "SMALL", [])
    done = runs.torchrun(2, tmp_path / "run", shards, "--config", str(trained), "--num-steps", "1")
    assert done.returncode == 0, done.stderr
    assert file.load(tmp_path / "run").num_steps == 1


# ---- Bad files ----------------------------------------------------------------------------------------------------

BAD = {
    "unknown": ("\n\nxyz = 1", "line 3: a name must be that of a flag, got xyz; --print-config lists all"),
    "other trainers' name": ("\nlearning_rate = 3e-4", "line 2: a name must be that of a flag, got learning_rate; "),
    "misspelt": ("[optim]\nlrr = 1", 'line 2: a name must be that of a flag, got optim.lrr; did you mean "optim.lr"?'),
    "in no table": ("lr = 1", "here it is optim.lr"),
    "unknown table": ("[train]\nseed = 1", "got train"),
    "text for a number": ('num_steps = "5"', "line 1: a value must have its type, got text in field num_steps, which"),
    "no integer": ("num_steps = 5.5", "got a number in field num_steps, which must be an integer"),
    "true for a number": ("seed = true", "got true or false in field seed, which must be an integer"),
    "text for a number or none": (
        'micro_batch_size = "big"',
        'text in field micro_batch_size, which must be an integer or "None"',
    ),
    "auto where none is": ('eval_every = "auto"', 'text in field eval_every, which must be an integer or "None"'),
    "NaN": ("[optim]\nlr = nan", "got nan in field optim.lr, which must be a number"),
    "infinity": ("[optim]\nlr = -inf", "got -inf in field optim.lr"),
    "too large": (f"seed = {2**64}", "got an integer of more than 64 bits in field seed"),
    "too many digits": (f"seed = {'1' * 5000}", "no TOML: Exceeds the limit"),
    "no choice": ('precision = "bf15"', "precision, which must be one of auto, bf16"),
    "None where none may be": ('seed = "None"', "got text in field seed"),
    "a date": ("data = 2020-01-01", "got date in field data, which must be text"),
    "a list": ("data = ['a', 'b']", "got a list in field data, which must be text"),
    "a preset for a model": ('model = "gpt2"', 'a preset is named by preset = "gpt2"'),
    "two spellings": ("num-steps = 1\nnum_steps = 1", "num_steps must be set once, got it twice"),
    "no preset": ("preset = 5", "got an integer in field preset, which must be text"),
    "no value": ("a = [", "no TOML: Invalid value (at end of document)"),
    "nested": (f"a = {'[' * 100_000}", "TOML that is nested too deep"),
    "not UTF-8": (b"data = '\xff'", "text that is not UTF-8 at byte 8"),
    "heads": ("[model]\nn_head = 7", "n_embd must be a multiple of n_head, got 128 and 7"),
    "a value that no run has": ("num_steps = 0", "--num-steps must be at least 1, got 0\n  with the settings of "),
    "JSON": ("{}", "no field model"),
    "cut JSON": (' {"data":', "no JSON: "),
    "weights": ('{"model_type": "gpt2"}', "the config of weights, which --init-from takes"),
}


@pytest.mark.parametrize(("content", "sentence"), BAD.values(), ids=BAD)
def test_a_bad_file_is_a_sentence_with_its_name(content, sentence, write):
    mine = write(content)
    with pytest.raises(BadInput) as raised:
        parse(["tiny", "--config", mine], PROG)
    said = str(raised.value)
    assert said.startswith(f"{PROG}: ")
    assert sentence in said
    assert mine in said


def test_all_that_is_wrong_is_told_at_once(write):
    with pytest.raises(BadInput) as raised:
        parse(["tiny", "--config", write("a = 1\n[optim]\nlrr = 1\nlr = 'x'\n")], PROG)
    assert len(str(raised.value).splitlines()) == 3


@pytest.mark.parametrize("name", ["data", "out", "tuned", "resume", "init_from", "hellaswag", "lambada"])
def test_a_path_with_a_nul_character_is_a_sentence(name, write):
    mine = write(f'{name} = "a\\u0000b"')
    flag = name if name == "data" else f"--{name.replace('_', '-')}"
    with pytest.raises(BadInput, match=f"{flag}.* must have no NUL character, got 'a\\\\x00b'"):
        parse(["tiny", "--config", mine], PROG)


def test_what_is_no_file_is_named_and_not_waited_for(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("gone")
    for name, got in (
        ("nowhere", "got nowhere, which does not exist"),
        ("folder", "got folder/config.json, which does not exist"),
        ("pipe", "got pipe: a named pipe"),
        ("link", "got link: a link to gone, which does not exist"),
        ("/dev/zero", "got /dev/zero: a device"),
        ("", r"got \.: a directory"),
        ("a\0b", "got a\0b: embedded null byte"),
        ("x" * 5000, "File name too long"),
    ):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(BadInput, match=f"^{PROG}: --config must be a TOML file, or a run's config.json, .*{got}"):
            parse(["tiny", "--config", name], PROG)


def test_without_a_preset_the_file_must_name_one_or_everything(write):
    with pytest.raises(BadInput, match=r"without data, out, .* and \d\d more; put the preset first, or preset = "):
        parse(["--config", write("num_steps = 5")], PROG)
    with pytest.raises(BadInput, match="the preset must be one that exists, got 'gpt'; did you mean \"gpt2\""):
        parse(["--config", write('preset = "gpt"')], PROG)
    everything = toml.dump(PRESETS["tiny"], PROG)
    with pytest.raises(BadInput, match=r"without optim\.clip; put the preset first"):
        parse(["--config", write(everything.replace("clip = 1.0", ""))], PROG)
