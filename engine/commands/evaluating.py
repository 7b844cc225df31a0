"""`gpt2 eval`."""

import math
import os
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from engine import flags, output
from engine.errors import DONE, BadInput, Diverged, exit_code, warn

if TYPE_CHECKING:  # --help must not wait for PyTorch
    from engine.distributed import Ranks
    from engine.run.checkpoint import Checkpoint
    from engine.tasks.scoring import Task
    from engine.tokens.tokenizer import Tokenizer
    from model.gpt2 import GPT2


@dataclass(frozen=True)
class Evaluate:
    """Prints the validation loss of a run's newest checkpoint, or how it does on a text, HellaSwag or LAMBADA."""

    run: str  # run directory
    data: str | None = None  # token shards, or a text file; None: the run's, if no --hellaswag or --lambada is given
    eval_tokens: int | None = None  # tokens of the validation split or text; None: as many as the run used, all of it
    stride: int | None = None  # of a text file: tokens that a window predicts, after context; None: all of its tokens
    hellaswag: str | None = None  # HellaSwag's .jsonl: data/hellaswag_val.jsonl of github.com/rowanz/hellaswag
    convention: Literal["both", "llm.c", "lm-eval"] = "both"  # whose texts and acc_norm of HellaSwag
    lambada: str | None = None  # LAMBADA's .jsonl, a "text" per line: OpenAI's lambada_test.jsonl
    limit: int | None = None  # first examples of HellaSwag and LAMBADA to use; None: all
    best: bool = False  # use the checkpoint with the lowest validation loss, not the newest
    json: bool = False  # print one JSON object, not lines


@dataclass(frozen=True)
class Subject:
    """What is evaluated, and on which processes."""

    model: "GPT2"
    tokenizer: "Tokenizer"
    checkpoint: "Checkpoint"
    ranks: "Ranks"


def evaluate(args: list[str], prog: str) -> int:
    """Prints what a run's model comes to. Processes of torchrun (-m -- engine.cli eval ...) share the work."""
    asked = flags.checked(Evaluate, args, prog)
    for name in ("eval_tokens", "stride", "limit"):
        if getattr(asked, name) is not None and getattr(asked, name) < 1:
            raise BadInput(f"eval: --{name.replace('_', '-')} must be at least 1, got {getattr(asked, name)}")
    if asked.stride is not None and (asked.data is None or not is_text(asked.data)):
        got = asked.data or "no --data"
        raise BadInput(f"eval: --stride must go with --data FILE, a text file, got {got}; leave it out")
    if asked.limit is not None and asked.hellaswag is None and asked.lambada is None:
        raise BadInput("eval: --limit must go with --hellaswag or --lambada, got neither; leave it out")
    from engine import distributed

    try:
        with distributed.process_group() as ranks:
            found = _figures(asked, ranks)
            if ranks.is_first:
                print(_as_json(found) if asked.json else "\n".join(_lines(found)), flush=True)
    except (BadInput, Diverged) as error:
        warn(str(error))
        return distributed.leave(exit_code(error))
    return distributed.leave(DONE)


def is_text(path: str) -> bool:
    """Whether --data names a file, which is read as text, and not a directory of shards."""
    return os.path.lexists(path) and not os.path.isdir(path)


def _figures(asked: Evaluate, ranks: "Ranks") -> dict[str, Any]:
    """All figures that are asked for, as JSON types. All ranks call it."""
    from model.generate import NotFinite

    checkpoint = _checkpoint(asked, ranks)
    with ranks.fail_together():
        subject = _load(checkpoint, ranks)
        tasks = _tasks(asked, subject)
        wants_loss = asked.data is not None or asked.eval_tokens is not None or not tasks
        digest, loss = _loss_of(asked, subject) if wants_loss else (None, None)
        facts = _facts(asked, checkpoint, tasks, digest)
    ranks.check_alike(facts, "eval")
    step = subject.checkpoint.step
    found: dict[str, Any] = {"run": asked.run, "step": step}
    if subject.model.end_of_text is not None:
        found["document_mask"] = True
    try:
        if loss is not None:
            found |= loss()
            if not math.isfinite(found["loss"]):
                raise NotFinite(f"the loss must be finite, got {found['loss']}")
        for name, convention, task in tasks:
            figures = task.run(subject.model, ranks)
            figures = {"examples": task.num_examples} | _with_errors(figures, task.num_examples)
            found[name] = found.get(name, {}) | ({convention: figures} if convention else figures)
    except NotFinite as error:
        raise Diverged(f"eval: {error} at step {step} of {asked.run}; try --best") from error
    return found


def _checkpoint(asked: Evaluate, ranks: "Ranks") -> "Checkpoint":
    """The checkpoint that rank 0 finds: a run that still trains may save or delete one meanwhile."""
    from engine.run import export

    found = None
    with ranks.fail_together():
        if ranks.is_first:
            found = export.find(asked.run, warn, asked.best)
    return ranks.broadcast_object(found)


def _load(checkpoint: "Checkpoint", ranks: "Ranks") -> Subject:
    from engine.run import checkpoint as checkpoints
    from engine.run import export

    if not ranks.is_first:  # on another host the files may be others, or damaged
        checkpoints.read(checkpoint.path)
    return Subject(*export.load(checkpoint), checkpoint, ranks)


def _facts(
    asked: Evaluate, checkpoint: "Checkpoint", tasks: list[tuple[str, str, "Task"]], digest: str | None
) -> dict[str, Any]:
    """Facts that must be the same on every rank. digest: of the tokens whose loss is asked for."""
    import dataclasses

    from engine.run import resume
    from engine.run.verify import MANIFEST
    from engine.tasks import scoring
    from engine.tokens.shards import sha256

    try:
        weights = f"{checkpoint.path.name} {sha256(checkpoint.path / MANIFEST)[:12]}"
    except OSError as error:
        raise BadInput(
            f"eval: {checkpoint.path} must stay until it is read, got {MANIFEST}: {error.strerror}; run it again"
        ) from error
    given = {f"--{name.replace('_', '-')}": value for name, value in dataclasses.asdict(asked).items()}
    asks = {f"{name} examples {convention}".strip(): scoring.digest(task.requests) for name, convention, task in tasks}
    return given | {"checkpoint": weights, "tokens of the loss": digest} | asks | resume.versions()


def _tasks(asked: Evaluate, subject: Subject) -> list[tuple[str, str, "Task"]]:
    """(name, convention, task) of each question set."""
    from engine.tasks import hellaswag, lambada

    found, most = [], subject.model.config.n_positions
    if asked.hellaswag is not None:
        for convention in hellaswag.CONVENTIONS if asked.convention == "both" else (asked.convention,):
            task = hellaswag.load(asked.hellaswag, convention, subject.tokenizer, most, asked.limit)
            found.append((task.name, convention, task))
    if asked.lambada is not None:
        task = lambada.load(asked.lambada, subject.tokenizer, most, asked.limit)
        found.append((task.name, "", task))
    return found


def _loss_of(asked: Evaluate, subject: Subject) -> tuple[str, Any]:
    """(digest of the tokens, a function that computes the loss) of --data. Raises BadInput if that cannot be used."""
    import dataclasses

    from engine import config, evaluation
    from engine.run import directory, export
    from engine.tasks import scoring, text
    from engine.tokens import foreign, mixture, weights

    model, tokenizer, ranks = subject.model, subject.tokenizer, subject.ranks
    run = config.load(asked.run)
    if asked.data is None and (source := directory.resolved(asked.run).get("imported_from")) is not None:
        raise BadInput(
            f"eval: --data must be given, got none, and {asked.run} holds weights from {source} and no data; name a "
            f"text file, or a directory made by {output.program()} prepare"
        )
    context = min(run.sequence_length, model.config.n_positions)
    if asked.data is not None and is_text(asked.data):
        tokens = text.load(asked.data, tokenizer)[: None if asked.eval_tokens is None else asked.eval_tokens + 1]
        if not 1 <= (stride := asked.stride or context) <= context:
            raise BadInput(f"eval: --stride must be at most the {context} tokens that the model reads, got {stride}")
        requests, predicted = text.requests(tokens, context, stride), tokens[1:]
        digest = scoring.digest(requests)
        what = (asked.data, f"{tokenizer.unit}s of {asked.data}")

        def loss() -> float:
            return -float(scoring.score(model, requests, ranks).log_p.sum()) / len(predicted)

        text_bytes = partial(evaluation.num_bytes, predicted, tokenizer)
    else:
        if asked.data is not None and len(weights.parse(asked.data)) == 1 and not os.path.lexists(asked.data):
            way = f"name a text file, or make token shards with {output.program()} prepare"
            raise BadInput(
                f"eval: --data must be a directory of token shards or a text file, got {asked.data}"
                f"{foreign.hint(asked.data, way)}"
            )
        run = dataclasses.replace(run, data=asked.data or run.data, eval_tokens=asked.eval_tokens or run.eval_tokens)
        export.check_tokenizer(run.data, tokenizer.name)
        stream = mixture.open_stream(run.data, "val", tokenizer.vocab_size)
        windows = evaluation.windows(stream, context, run.eval_tokens)
        tokens = stream.windows(windows, context).numpy()
        predicted, digest = tokens[:, 1:], scoring.digest(scoring.Request(each, context) for each in tokens)
        what = (run.data, f"validation {tokenizer.unit}s of {run.data}")
        loss = partial(evaluation.mean_loss, model, stream, windows, context, ranks)
        text_bytes = partial(evaluation.weighted_bytes, stream, windows, predicted, tokenizer)

    def figures() -> dict[str, Any]:
        mean, num_bytes = loss(), text_bytes()
        return {
            "data": what[0],
            "of": what[1],
            "unit": tokenizer.unit,
            "loss": mean,
            "perplexity": evaluation.perplexity(mean),
            "bits_per_byte": mean * predicted.size / num_bytes / math.log(2) if num_bytes else math.inf,
            "tokens": predicted.size,
            "bytes": num_bytes,
        }

    return digest, figures


def _with_errors(figures: dict[str, float], count: int) -> dict[str, Any]:
    """The figures with the number of right examples and the standard error of each accuracy."""
    found: dict[str, Any] = {}
    for name, value in figures.items():
        found[name] = value
        if name.startswith("acc"):
            found[f"{name}_correct"] = round(value * count)
            found[f"{name}_stderr"] = math.sqrt(value * (1 - value) / (count - 1)) if count > 1 else None
    return found


def _as_json(found: dict[str, Any]) -> str:
    import json

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(each) for name, each in value.items() if name != "of"}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(found))


def _lines(found: dict[str, Any]) -> list[str]:
    who, lines = f"{found['run']} at step {found['step']:,}", []
    who += " with its document mask" if found.get("document_mask") else ""
    if "loss" in found:
        lines.append(
            f"{who}: loss {found['loss']:.4f} nats per {found['unit']}, perplexity {found['perplexity']:.2f}, on "
            f"{found['tokens']:,} {found['of']}"
        )
        lines.append(f"  {found['bits_per_byte']:.4f} bits per byte, of {found['bytes']:,} bytes of text")
    for name, title in (("hellaswag", "HellaSwag"), ("lambada", "LAMBADA")):
        if (figures := found.get(name)) is None:
            continue
        each = {"": figures} if "acc" in figures else figures
        lines.append(f"{who}: {title}, {next(iter(each.values()))['examples']:,} examples")
        for convention, one in each.items():
            parts = [_accuracy(one, key) for key in ("acc", "acc_norm") if key in one]
            parts += [f"perplexity of the last word {one['ppl']:.2f}"] if "ppl" in one else []
            lines.append("  " + "  ".join([*([f"{convention:<7}"] if convention else []), *parts]))
    return lines


def _accuracy(figures: dict[str, Any], name: str) -> str:
    error = figures[f"{name}_stderr"]
    spread = "" if error is None else f" +- {100 * error:.2f}"
    return f"{name} {100 * figures[name]:.2f}%{spread} ({figures[f'{name}_correct']:,} right)"
