"""Training, from top to bottom: `gpt2 train gpt2 --data DIR`, or `torchrun --nproc_per_node=8 engine/train.py ...`.

The loop reads in time order. Step s evaluates, samples and saves with the weights that s updates made, then makes one
more update; a last pass evaluates and saves the final weights. Nothing imports this file.
"""

import sys
from pathlib import Path

if __name__ == "__main__" and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # run as a file: import as from the repository root

import torch
from torch import Tensor, nn

from engine import checkpoint, data, distributed, evaluation, metrics, optim, plots, precision, runs, tokenizer
from engine.config import TrainConfig, batch_shape, parse
from engine.distributed import Ranks
from engine.errors import BadInput
from model.gpt2 import GPT2


def train(config: TrainConfig, ranks: Ranks) -> None:
    """Trains one run to its end, or says that it is complete."""
    words = tokenizer.load(data.tokenizer_name(config.data))
    runs.check_vocabulary(config, words)
    micro_batch_size, accumulation = batch_shape(config, ranks.world_size)
    train_stream = data.TokenStream.open(config.data, "train", words.vocab_size)
    val_stream = data.TokenStream.open(config.data, "val", words.vocab_size)
    val_windows = evaluation.windows(val_stream, config)
    batches = data.Batches(
        train_stream,
        config.sequence_length,
        micro_batch_size,
        accumulation,
        config.seed,
        ranks.rank,
        ranks.world_size,
        pin=ranks.device.type == "cuda",
    )

    identity = runs.identity(config, words.name, data.digest([train_stream, val_stream], config.data))
    if ranks.is_first:
        runs.open_out(config)
    ranks.agree(None)  # the directory is there
    found = runs.find_checkpoint(config, identity, ranks.say)
    start = 0 if found is None else found.step
    if start == config.num_steps:
        ranks.say(runs.report(config, words.unit, "this run is complete"))
        return

    arithmetic, why = ranks.agree(precision.choose(config.precision, ranks.device))
    torch.manual_seed(config.seed)
    raw_model = GPT2(config.model)  # the one that is saved, evaluated and sampled
    if found is not None:
        checkpoint.load_weights(found, raw_model)
    elif config.init_from is not None:
        runs.load_weights(config.init_from, raw_model)
    raw_model.to(ranks.device)
    ops = runs.configure(raw_model, config, precision.apply(arithmetic))
    optimizer = optim.build(raw_model, config)
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=arithmetic == "fp16")
    if found is not None:
        checkpoint.load_optimizer(found, raw_model, optimizer)
        scaler.load_state_dict(found.state["scaler"])
    compiled, compile_why = runs.wants_compile(config, ranks.device)
    model = torch.compile(raw_model, dynamic=False) if compiled else raw_model
    model = distributed.wrap(model, ranks)  # the one that is run

    if ranks.is_first:
        runs.write_config(config, words.name, {"precision": arithmetic, "micro_batch_size": micro_batch_size})
    ranks.say(
        f"{config.name}: {raw_model.num_parameters():,} parameters; {len(train_stream):,} training and "
        f"{len(val_stream):,} validation {words.unit}s in {config.data}\n"
        f"step: {config.tokens_per_step:,} {words.unit}s = {micro_batch_size} sequences x {config.sequence_length} x "
        f"{accumulation} micro-batches x {ranks.world_size} processes on {ranks.device.type}\n"
        f"precision: {arithmetic}, {why}\nkernels: {ops.summary()}\ncompile: {compile_why}"
        + (f"\ngoing on from {found.path}" if found is not None else "")
    )
    record = metrics.Metrics(config, start, ranks.is_first, words.unit)
    flops_per_step = config.tokens_per_step * metrics.flops_per_token(config.model, config.sequence_length)
    peak = metrics.peak_flops(ranks.device, arithmetic)  # FLOP/s of one device, or None
    clock = metrics.Clock()
    try:
        for step in range(start, config.num_steps + 1):  # one pass more than updates, for the final weights
            is_last = step == config.num_steps
            if is_last or due(step, config.eval_every):
                record.log(step, val_loss=evaluation.mean_loss(raw_model, val_stream, val_windows, config, ranks))
                if ranks.is_first:
                    record.sample(step, runs.sample(raw_model, words, config))
                    plots.draw(config, record.rows(), words.unit)
            if (is_last or due(step, config.save_every)) and step > start and ranks.is_first:
                record.sync(row_is_complete=is_last)
                state = runs.state(step, config, identity, ranks.world_size, scaler)
                checkpoint.save(config.out, state, raw_model, optimizer, config.keep_last)
            if is_last:
                break

            clock.start()
            lr = optim.learning_rate(step, config)
            loss, grad_norm = train_step(model, optimizer, scaler, batches.at(step), lr, step, config, ranks)
            if due(step, config.log_every):  # .item() waits for the GPU: only here
                loss, grad_norm = ranks.mean(loss).item(), grad_norm.item()
                clock.stop()
                seconds = clock.read()  # per step
                record.log(
                    step,
                    loss=loss,
                    lr=lr,
                    grad_norm=grad_norm,
                    tokens_per_s=config.tokens_per_step / seconds,
                    step_ms=1e3 * seconds,
                    mfu=flops_per_step / seconds / (peak * ranks.world_size) if peak else None,
                    peak_gib=metrics.peak_gib(ranks.device),
                )
            else:
                clock.stop()
            record.end_step(step)
    finally:
        record.close()
        batches.close()
    ranks.say(runs.report(config, words.unit, "done"))


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    micro_batches: list[tuple[Tensor, Tensor]],
    lr: float,
    step: int,
    config: TrainConfig,
    ranks: Ranks,
) -> tuple[Tensor, Tensor]:
    """One update. Returns this rank's mean loss and the norm of the whole gradient before clipping, not waited for."""
    torch.manual_seed(data.derived_seed(config.seed, step, ranks.rank))  # of dropout, so that there is no state to save
    total = torch.zeros((), device=ranks.device)
    for index, (tokens, targets) in enumerate(micro_batches):
        distributed.synchronize_gradients(model, index == len(micro_batches) - 1)
        tokens, targets = tokens.to(ranks.device, non_blocking=True), targets.to(ranks.device, non_blocking=True)
        loss = model(tokens, targets) / len(micro_batches)
        scaler.scale(loss).backward()
        total += loss.detach()
    scaler.unscale_(optimizer)
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
    optim.set_learning_rate(optimizer, lr)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return total, grad_norm


def due(step: int, every: int | None) -> bool:
    """Whether something done every so many steps is done at this one."""
    return every is not None and step % every == 0


def main(args: list[str]) -> int:
    """Exit code: 0 done, 2 bad input, 130 interrupted."""
    try:
        config = parse(args, "gpt2 train")
        with distributed.process_group() as ranks:
            train(config, ranks)
    except BadInput as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ngpt2 train: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
