"""The subcommands of `gpt2`: the flags of each, and what it does.

Each imports what it needs when it runs, so that --help is fast.
"""

import functools
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from engine import flags, output
from engine.errors import DAMAGED, DONE, BadInput, Diverged, nearest


@dataclass(frozen=True)
class Sample:
    """Continues a prompt with a trained model. Prints each token as it is sampled."""

    run: str  # run directory
    prompt: str  # text to continue, at most as many tokens as positions were trained
    max_new_tokens: int = 200  # most tokens to add; an end-of-text token stops earlier
    temperature: float = 0.8  # divides the logits; 0: the most likely token each time; 1: the model's distribution
    top_k: int | None = 50  # sample from the k most likely tokens; None: from all
    top_p: float | None = None  # sample from the fewest most likely tokens with this total probability; None: from all
    seed: int | None = None  # seed that makes samples repeatable; sample i, from 0, uses seed + i; None: random
    num_samples: int = 1  # number of continuations
    best: bool = False  # use the checkpoint with the lowest validation loss, not the newest


@dataclass(frozen=True)
class Evaluate:
    """Prints the validation loss of a run's newest checkpoint, or of its best."""

    run: str  # run directory
    data: str | None = None  # directory of token shards; None: the run's
    eval_tokens: int | None = None  # tokens of the validation split to use; None: as many as the run used
    best: bool = False  # use the checkpoint with the lowest validation loss, not the newest


@dataclass(frozen=True)
class Export:
    """Writes a run's model and tokenizer as files that the transformers library opens."""

    run: str  # run directory
    out: str  # directory to write, new or empty
    best: bool = False  # use the checkpoint with the lowest validation loss, not the newest


@dataclass(frozen=True)
class Plot:
    """Redraws loss_curve.png and lr_schedule.png of a run."""

    run: str  # run directory


@dataclass(frozen=True)
class Doctor:
    """Shows what this machine has, and what each op runs on here and why. Starts nothing."""

    preset: str = "gpt2"  # model preset, for its head_dim
    head_dim: int | None = None  # elements per attention head; None: the preset's
    precision: str = "auto"  # auto, bf16, fp16, tf32 or fp32, as for gpt2 train


MOST_SAMPLED = 1_000_000  # tokens of a sample, and samples


def _parse(kind: type, args: list[str], prog: str) -> Any:
    asked = flags.parse(kind, args, prog)
    if wrong := flags.too_large(asked):
        raise BadInput(f"{prog.removeprefix('gpt2 ')}: " + "\n  ".join(wrong))
    return asked


# ---- Commands -----------------------------------------------------------------------------------------------------


def prepare(args: list[str], prog: str) -> None:
    """Turns text into token shards."""
    import tyro

    from engine.tokens import prepare as preparation
    from engine.tokens.sources import STDLIB

    @dataclass(frozen=True, kw_only=True)
    class Prepare(preparation.PrepareConfig):
        """Turns text into token shards. A document is a file, a .jsonl line or a .parquet row."""

        sources: tyro.conf.Positional[tuple[str, ...]]  # .txt .md .py .jsonl .parquet, directories of them; or: stdlib

    asked = _parse(Prepare, args, prog)
    if not asked.sources:
        raise BadInput(f"prepare: a source must be given, got none; name a file, a directory or {STDLIB}")
    print(preparation.describe(preparation.prepare(list(asked.sources), asked), asked.out))


def train(args: list[str], prog: str) -> None:
    """Trains in this process; torchrun engine/train.py trains in several."""
    from engine import config

    config.parse(args, prog)  # answers --help and bad flags before PyTorch is imported
    import runpy

    sys.argv = [prog, *args]
    runpy.run_module("engine.train", run_name="__main__")


def tune(args: list[str], prog: str) -> None:
    """Finds the fastest right way to train a preset on this machine, and writes it to a file."""
    import tyro

    @dataclass(frozen=True)
    class Tune:
        """Checks and times what a training step can run on here: implementations, tiles, micro-batch.

        gpt2 train reads what it writes. It needs no data.
        """

        preset: tyro.conf.Positional[str]  # whose model, context and step are tuned
        micro_batch_size: int | None = None  # sequences per forward pass; None: tuned too
        precision: str = "auto"  # auto, bf16, fp16, tf32 or fp32, as for gpt2 train
        max_minutes: float = 3.0  # minutes after which nothing more is tried
        out: str | None = None  # file to write; None: one per machine and model, in the cache directory

    asked = _parse(Tune, args, prog)
    from typing import get_args

    from engine.config import PRESETS, Precision

    if asked.preset not in PRESETS:
        raise BadInput(
            f"tune: the preset must be one that exists, got {asked.preset!r}{nearest(asked.preset, PRESETS)}"
        )
    if asked.precision not in get_args(Precision):
        raise BadInput(f"tune: --precision must be one of {', '.join(get_args(Precision))}, got {asked.precision!r}")
    from engine.tuning import tune as tuning

    config = tuning.check(asked.preset, asked.micro_batch_size, asked.precision, asked.max_minutes)
    tuning.tune(asked.preset, config, asked.max_minutes, asked.out)


def sample(args: list[str], prog: str) -> None:
    """Continues a prompt. Prints each token as it is sampled."""
    asked = _parse(Sample, args, prog)
    import torch

    from engine import evaluation
    from engine.run import export
    from model.generate import NotFinite, stream

    for name, least in (("num_samples", 1), ("max_new_tokens", 0)):
        if not least <= getattr(asked, name) <= MOST_SAMPLED:
            flag = "--" + name.replace("_", "-")
            raise BadInput(
                f"sample: {flag} must be at least {least} and at most {MOST_SAMPLED:,}, got {getattr(asked, name)}"
            )
    model, tokenizer, checkpoint = export.load_model(asked.run, lambda line: print(line, file=sys.stderr), asked.best)
    ids = tokenizer.encode(asked.prompt).tolist()
    if not 1 <= len(ids) <= model.config.n_positions:
        raise BadInput(
            f"sample: --prompt must be 1 to {model.config.n_positions} {tokenizer.unit}s long, got {len(ids)}"
            f"{export.untrained_note(checkpoint)}"
        )
    prompt = torch.tensor([ids], device=model.wte.weight.device)
    for number in range(asked.num_samples):
        try:
            drawn = stream(
                model,
                prompt,
                asked.max_new_tokens,
                temperature=asked.temperature,
                top_k=asked.top_k,
                top_p=asked.top_p,
                seed=None if asked.seed is None else asked.seed + number,
            )
        except ValueError as error:
            raise BadInput(f"sample: {error}") from error
        if asked.num_samples > 1:
            print(f"{'' if number == 0 else chr(10)}--- sample {number + 1} of {asked.num_samples} ---")
        print(asked.prompt, end="", flush=True)
        try:
            for piece in evaluation.pieces(drawn, tokenizer):
                if output.has_failed():  # the reader may be `head`, which has all that it wants
                    return
                print(piece, end="", flush=True)
        except NotFinite as error:
            print()
            raise Diverged(f"sample: {error}, at step {checkpoint.step} of {asked.run}; try --best") from error
        print(flush=True)


def evaluate(args: list[str], prog: str) -> None:
    """Prints the validation loss of a run."""
    asked = _parse(Evaluate, args, prog)
    if asked.eval_tokens is not None and asked.eval_tokens < 1:
        raise BadInput(f"eval: --eval-tokens must be at least 1, got {asked.eval_tokens}")
    import dataclasses

    from engine import config, distributed, evaluation
    from engine.run import directory, export
    from engine.tokens.shards import TokenStream

    run = config.load(asked.run)
    model, tokenizer, checkpoint = export.load_model(asked.run, is_best=asked.best)
    if asked.data is None and (source := directory.resolved(asked.run).get("imported_from")) is not None:
        raise BadInput(
            f"eval: --data must be given, got none, and {asked.run} holds weights from {source} and no data; name a "
            f"directory made by {output.program()} prepare"
        )
    run = dataclasses.replace(run, data=asked.data or run.data, eval_tokens=asked.eval_tokens or run.eval_tokens)
    export.check_tokenizer(run.data, tokenizer.name)
    stream = TokenStream.open(run.data, "val", tokenizer.vocab_size)
    context = min(run.sequence_length, model.config.n_positions)
    windows = evaluation.windows(stream, context, run.eval_tokens)
    ranks = distributed.Ranks(0, 0, 1, model.wte.weight.device)
    loss = evaluation.mean_loss(model, stream, windows, context, ranks)
    if not loss < float("inf"):
        raise Diverged(
            f"eval: the loss must be finite, got {loss} at step {checkpoint.step} of {asked.run}; try --best"
        )
    print(
        f"{asked.run} at step {checkpoint.step:,}: loss {loss:.4f} nats per {tokenizer.unit}, perplexity "
        f"{evaluation.perplexity(loss):.2f}, on {len(windows) * context:,} validation {tokenizer.unit}s of {run.data}"
    )


def import_(args: list[str], prog: str) -> None:
    """Turns released weights into a run directory."""
    import tyro

    @dataclass(frozen=True)
    class Import:
        """Makes a run directory from GPT-2 weights in the Hugging Face layout, or from nanoGPT's ckpt.pt.

        The run can be sampled, evaluated, and trained from with --init-from.
        """

        source: tyro.conf.Positional[str]  # directory with config.json and weights, ckpt.pt, or a name such as gpt2
        out: str  # run directory to make, new or empty

    asked = _parse(Import, args, prog)
    from engine.config import GPT_PROMPT
    from engine.run import export

    checkpoint_path = export.import_weights(asked.source, asked.out)
    print(f'{checkpoint_path}\ntry: {output.program()} sample --run {shlex.quote(asked.out)} --prompt "{GPT_PROMPT}"')


def export(args: list[str], prog: str) -> None:
    """Turns a run into a directory that transformers opens."""
    asked = _parse(Export, args, prog)
    from engine.run import export as exporting

    exporting.export(asked.run, asked.out, asked.best)
    print(f"{asked.out}: open it with transformers.AutoModelForCausalLM.from_pretrained({asked.out!r})")


def plot(args: list[str], prog: str) -> None:
    """Redraws both plots of a run and prints their paths."""
    asked = _parse(Plot, args, prog)
    import dataclasses

    from engine import config
    from engine.run import curves, directory, plots
    from engine.tokens import tokenizer

    train_config = dataclasses.replace(config.load(asked.run), out=asked.run)
    unit = tokenizer.load(directory.tokenizer_name(asked.run)).unit
    for path in plots.draw(train_config, curves.read(asked.run), unit):
        print(path)


def verify(args: list[str], prog: str) -> int:
    """Checks every shard and checkpoint, byte by byte. Returns the exit code."""
    import tyro

    @dataclass(frozen=True)
    class Verify:
        """Reads all files of data and run directories and prints which are whole.

        Changes nothing.
        """

        paths: tyro.conf.Positional[tuple[str, ...]]  # data directories or run directories

    asked = _parse(Verify, args, prog)
    if not asked.paths:
        raise BadInput("verify: a path must be given, got none; name directories of token shards or of runs")
    from engine.run import verify as inspection

    return DAMAGED if inspection.verify(asked.paths, lambda line: print(line, flush=True)) else DONE


def doctor(args: list[str], prog: str) -> None:
    """Prints this machine's hardware and software, and the implementation of each op."""
    asked = _parse(Doctor, args, prog)
    from typing import get_args

    from engine.config import Precision
    from model.presets import PRESETS

    if asked.preset not in PRESETS:
        raise BadInput(f"doctor: --preset must be a preset, got {asked.preset!r}{nearest(asked.preset, PRESETS)}")
    if asked.precision not in get_args(Precision):
        raise BadInput(f"doctor: --precision must be one of {', '.join(get_args(Precision))}, got {asked.precision!r}")
    head_dim = PRESETS[asked.preset].head_dim if asked.head_dim is None else asked.head_dim
    if head_dim < 1:
        raise BadInput(f"doctor: --head-dim must be at least 1, got {head_dim}")
    import torch

    from engine import config, device
    from engine.checks import selfcheck
    from engine.tuning import record

    preset = config.PRESETS[asked.preset]
    if head_dim != preset.model.head_dim:  # nothing is remembered of other heads
        print(device.report(head_dim, asked.precision, lambda *_: None))
        return
    tuning, note = record.find(preset, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if tuning is not None and asked.precision not in ("auto", tuning.setup.precision):
        tuning, note = None, f"ignored, it is for {tuning.setup.precision}"
    tiles, ops = (tuning.setup.tiles, tuning.setup.ops) if tuning is not None else ({}, {})
    recall = functools.partial(selfcheck.recall_for, preset, tuned=tiles)
    print(device.report(head_dim, asked.precision, recall, ops, note.removeprefix("tuned: ")))


COMMANDS: dict[str, Callable[[list[str], str], int | None]] = {  # return the exit code; None: DONE
    "prepare": prepare,
    "train": train,
    "tune": tune,
    "sample": sample,
    "eval": evaluate,
    "import": import_,
    "export": export,
    "plot": plot,
    "verify": verify,
    "doctor": doctor,
}
