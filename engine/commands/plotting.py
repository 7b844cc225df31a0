"""`gpt2 plot`."""

from dataclasses import dataclass
from typing import Literal

from engine import flags
from engine.commands.comparing import new_file
from engine.errors import BadInput

PICTURE = "comparison.png"
MOST_SMOOTHED = 1_000_000  # rows


@dataclass(frozen=True)
class Plot:
    """Redraws loss_curve.png and lr_schedule.png of a run, or draws several runs on one axis.

    Several runs, or one with any of --out, --x, --smooth and --reference, make one picture.
    """

    run: str | None = None  # run directory, as the first word
    out: str | None = None  # picture of several runs, a PNG; None: comparison.png, here
    x: Literal["tokens", "steps", "hours"] = "tokens"  # axis; hours: training time, without evaluations
    smooth: int | None = None  # rows that the training loss is smoothed over; None: a twentieth of them, at most 50
    reference: tuple[str, ...] = ()  # curves of others: gpt2-124m, llm.c, first-run


def plot(args: list[str], prog: str) -> None:
    """Redraws both plots of a run, or draws several runs into one picture, and prints the paths."""
    import tyro

    @dataclass(frozen=True)
    class Runs(Plot):
        __doc__ = Plot.__doc__
        runs: tyro.conf.Positional[tuple[str, ...]] = ()  # run directories

    asked = flags.checked(Runs, args, prog)
    runs = (*asked.runs, *([asked.run] if asked.run is not None else []))
    if asked.smooth is not None and not 1 <= asked.smooth <= MOST_SMOOTHED:
        raise BadInput(f"plot: --smooth must be 1 to {MOST_SMOOTHED:,} rows, got {asked.smooth}")
    if not runs:
        raise BadInput("plot: a run must be given, got none; name directories made by gpt2 train")
    if len(runs) == 1 and (asked.out, asked.x, asked.smooth, asked.reference) == (None, "tokens", None, ()):
        _redraw(runs[0])
        return
    out = new_file(PICTURE if asked.out is None else asked.out, "plot")
    from engine.comparison import overlay, records, references

    found = records.read_all(runs, "plot")
    overlay.check(found, asked.x)
    curves = references.load_all(asked.reference, found, asked.x, "plot")
    print(overlay.draw(found, curves, asked.x, asked.smooth, out))


def _redraw(run: str) -> None:
    """Both pictures of one run, in its directory."""
    import dataclasses

    from engine import config
    from engine.run import curves, directory, plots
    from engine.tokens import tokenizer

    train_config = dataclasses.replace(config.load(run), out=run)
    unit = tokenizer.load(directory.tokenizer_name(run)).unit
    for path in plots.draw(train_config, curves.read(run), unit):
        print(path)
