"""`gpt2 plot`."""

from dataclasses import dataclass

from engine import flags


@dataclass(frozen=True)
class Plot:
    """Redraws loss_curve.png and lr_schedule.png of a run."""

    run: str  # run directory


def plot(args: list[str], prog: str) -> None:
    """Redraws both plots of a run and prints their paths."""
    asked = flags.checked(Plot, args, prog)
    import dataclasses

    from engine import config
    from engine.run import curves, directory, plots
    from engine.tokens import tokenizer

    train_config = dataclasses.replace(config.load(asked.run), out=asked.run)
    unit = tokenizer.load(directory.tokenizer_name(asked.run)).unit
    for path in plots.draw(train_config, curves.read(asked.run), unit):
        print(path)
