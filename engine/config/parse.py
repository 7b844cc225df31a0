"""From the words of a command line to a config."""

import dataclasses

from engine import flags, output, sizes
from engine.config.fields import TrainConfig, flag_of
from engine.config.presets import PRESETS, presets_help
from engine.errors import BadInput, nearest


def parse(args: list[str], prog: str) -> TrainConfig:
    """Parses `PRESET --flags`.

    With --init-from the model has the sizes of those weights. Raises BadInput for a bad preset or
    value; for an unknown flag tyro exits with 2.
    """
    if args and args[0] in ("-h", "--help"):
        print(presets_help(prog.replace("gpt2", output.program(), 1)))
        raise SystemExit(0)
    if not args or args[0].startswith("-"):
        got = args[0] if args else "nothing"
        raise BadInput(f"{prog}: a preset must come first, got {got}; choose from {', '.join(PRESETS)}")
    preset, *args = args
    if preset not in PRESETS:
        raise BadInput(f"{prog}: the preset must be one that exists, got {preset!r}{nearest(preset, PRESETS)}")
    switches = {"--compile": ["--compile", "True"], "--no-compile": ["--compile", "False"]}
    args = [part for arg in args for part in switches.get(arg, [arg])]
    for index, word in enumerate(args):  # --micro-batch-size auto is the None of config.json
        flag, has_value, value = word.replace("_", "-").partition("=")
        if flag == "--micro-batch-size" and (value if has_value else "".join(args[index + 1 : index + 2])) == "auto":
            args[index : index + 2 - bool(has_value)] = [flag, "None"]
    try:
        config = flags.parse(TrainConfig, args, f"{prog} {preset}", PRESETS[preset])
        config = with_sizes_of_weights(config, args)
    except ValueError as error:
        raise BadInput(f"{prog}: {error}") from error
    if wrong := config.problems():
        raise BadInput(f"{prog}: " + "\n  ".join(wrong))
    return config


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
