"""`gpt2 eval`."""

from dataclasses import dataclass

from engine import flags, output
from engine.errors import BadInput, Diverged


@dataclass(frozen=True)
class Evaluate:
    """Prints the validation loss of a run's newest checkpoint, or of its best."""

    run: str  # run directory
    data: str | None = None  # directory of token shards; None: the run's
    eval_tokens: int | None = None  # tokens of the validation split to use; None: as many as the run used
    best: bool = False  # use the checkpoint with the lowest validation loss, not the newest


def evaluate(args: list[str], prog: str) -> None:
    """Prints the validation loss of a run."""
    asked = flags.checked(Evaluate, args, prog)
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
