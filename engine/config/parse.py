"""From the words of a command line, and a file of settings, to a config."""

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from typing import NoReturn

from engine import flags, output, sizes
from engine.config import toml
from engine.config.fields import READ_WITH, TrainConfig, flag_of, is_read
from engine.config.file import given
from engine.config.presets import PRESETS, Recipe, presets_help, with_recipe
from engine.errors import BAD_INPUT, DONE, BadInput, nearest
from model.files import few


@dataclass(frozen=True)
class Asked(TrainConfig):
    """Trains a GPT-2 on token shards made by `gpt2 prepare`."""

    recipe: Recipe = "preset"  # fast: for the presets with AdamW, Muon and half as many steps
    config: str | None = None  # file of settings that flags change: TOML, or a run's config.json; the preset may go
    print_config: bool = False  # print all settings as TOML, for --config, and stop


FIELDS = [each.name for each in dataclasses.fields(TrainConfig)]


def parse(args: list[str], prog: str, warn: Callable[[str], None] | None = None) -> TrainConfig:
    """Parses `PRESET --flags`. A flag wins over the file of --config, the file over the preset.

    With --init-from the model has the sizes of those weights. With --print-config it prints the config
    and exits with 0. warn: gets a line for each flag without effect, on the first of torchrun's
    processes. Raises BadInput for a bad preset, file or value; for an unknown flag tyro exits with 2.
    """
    if args and args[0] in ("-h", "--help"):
        print(presets_help(prog.replace("gpt2", output.program(), 1)))
        raise SystemExit(0)
    preset, args = (args[0], args[1:]) if args and not args[0].startswith("-") else (None, args)
    switches = {"--compile": ["--compile", "True"], "--no-compile": ["--compile", "False"]}
    args = [part for arg in args for part in switches.get(arg, [arg])]
    for index, word in enumerate(args):  # --micro-batch-size auto is the None of config.json
        flag, has_value, value = word.replace("_", "-").partition("=")
        if flag == "--micro-batch-size" and (value if has_value else "".join(args[index + 1 : index + 2])) == "auto":
            args[index : index + 2 - bool(has_value)] = [flag, "None"]
    file = last_value(args, "--config")
    name, base, named = _base(preset, file, args, prog)
    called = f"{prog} {preset}" if preset is not None else prog
    try:
        asked = flags.parse(TrainConfig, args, called, Asked(**{name: getattr(base, name) for name in FIELDS}))
        config = TrainConfig(**{name: getattr(asked, name) for name in FIELDS})
        config = with_sizes_of_weights(config, [*args, *named])
    except ValueError as error:
        raise BadInput(f"{prog}: {error}") from error
    wrong = config.problems()
    if asked.recipe == "fast" and config.optim.name != "muon":
        wrong.append(f"--recipe fast must go with --optim.name muon, got {config.optim.name}; leave one of them out")
    if wrong:
        raise BadInput(f"{prog}: " + "\n  ".join([*wrong, *([f"with the settings of {file}"] if file else [])]))
    if asked.print_config:
        _print(config, prog)
    if warn is not None and os.environ.get("RANK", "0") == "0":
        for line in without_effect(config, args, name if asked.recipe == "fast" else None):
            warn(f"{prog}: {line}")
    return config


def without_effect(config: TrainConfig, args: list[str], fast: str | None) -> list[str]:
    """A line for each flag that was given and changes nothing. fast: the preset that --recipe fast was given with."""
    given, lines = {word.partition("=")[0].replace("_", "-") for word in args}, []
    for name, (decides, values) in READ_WITH.items():
        above, dot, last = name.rpartition(".")
        flags_of = {flag_of(name), flag_of(f"{above}{dot}no_{last}")}
        if not is_read(name, config) and (found := given & flags_of):
            got = toml.value_of(config, decides)
            needs = f"{flag_of(decides)} {' or '.join(values)}"
            lines += [f"{flag} has no effect: it needs {needs}, got {got}" for flag in sorted(found)]
    if fast is not None and PRESETS[fast].optim.name == "muon":
        lines.append(f"--recipe fast has no effect: it is for presets with AdamW, and {fast} has Muon")
    return lines


def last_value(args: list[str], flag: str) -> str | None:
    """The last value of a flag, or None."""
    found = None
    for word, following in zip_longest(args, args[1:]):
        if word.startswith(f"{flag}="):
            found = word.partition("=")[2]
        elif word == flag:
            found = following
    return found


def _base(
    preset: str | None, file: str | None, args: list[str], prog: str
) -> tuple[str | None, TrainConfig, list[str]]:
    """(name of the preset, what flags change, the flags of settings that a TOML names)."""
    held = None if file is None else given(file, prog)
    if preset is None and held is None:
        got = args[0] if args else "nothing"
        raise BadInput(f"{prog}: a preset must come first, got {got}; choose from {', '.join(PRESETS)}")
    name = preset if preset is not None or held is None else held.preset
    if name is not None and name not in PRESETS:
        raise BadInput(f"{prog}: the preset must be one that exists, got {name!r}{nearest(name, PRESETS)}")
    recipe = last_value(args, "--recipe") or "preset"
    if recipe != "preset" and (name is None or (held is not None and held.is_run)):
        raise BadInput(f"{prog}: --recipe must go with a preset, got every setting from {file}; leave out one of them")
    start = with_recipe(PRESETS[name], recipe) if name is not None else TrainConfig()
    if held is None:
        return name, start, []
    if held.is_run and not any(word.partition("=")[0] == "--out" for word in args):
        raise BadInput(f"{prog}: --out must be given with the config of the run {file}, which has its own; choose one")
    if name is None and not held.is_run and (missing := [each for each in toml.FIELDS if each not in held.values]):
        raise BadInput(
            f"{prog}: without a preset --config must be a file with every setting, got {file} without "
            f'{few(missing)}; put the preset first, or preset = "gpt2" into the file'
        )
    try:
        base = toml.applied(held.values, start)
    except ValueError as error:
        raise BadInput(f"{prog}: {file}: {error}") from error
    if held.is_run and name is not None and PRESETS[name].model != base.model:
        raise BadInput(
            f"{prog}: with the config of a run, which has every setting, the preset must be left out or be the run's "
            f"own, got {name} and {file} of another model; leave out {name} or --config"
        )
    return name, base, [] if held.is_run else [flag_of(each) for each in held.values]


def _print(config: TrainConfig, prog: str) -> NoReturn:
    """Prints the config on the first of torchrun's processes and exits."""
    output.protect(f"{prog} --print-config")
    if os.environ.get("RANK", "0") == "0":
        print(toml.dump(config, prog))
    raise SystemExit(DONE if output.is_whole() else BAD_INPUT)


def with_sizes_of_weights(config: TrainConfig, args: list[str]) -> TrainConfig:
    """The config with the model sizes of --init-from, if they are known, in place of the preset's.

    A run that began with these weights keeps its sizes, so that it goes on without them. The context
    stays the preset's if it is shorter. Raises ValueError if a flag asks for another size.
    """
    if config.init_from is None:
        return config
    began = sizes.of_run(config.out, config.init_from) if config.resume != "never" else None
    if (found := began or sizes.of_weights(config.init_from)) is None:
        return config
    if -(-found["vocab_size"] // 128) * 128 == config.model.padded_vocab_size:  # padded by another trainer
        found["vocab_size"] = config.model.vocab_size
    given = {word.partition("=")[0].replace("_", "-") for word in args}
    for name, theirs in found.items():
        if flag_of(f"model.{name}") in given and (ours := getattr(config.model, name)) != theirs:
            raise ValueError(
                f"{flag_of('model.' + name)} must be that of the weights in --init-from {config.init_from}, {theirs}, "
                f"got {ours}; leave it out" + ("; --context may be shorter" if name == "n_positions" else "")
            )
    context = config.context
    if context is None and config.model.n_positions < found["n_positions"]:
        context = config.model.n_positions
    return dataclasses.replace(config, context=context, model=dataclasses.replace(config.model, **found))
