"""Training, from top to bottom: `gpt2 train gpt2 --data DIR`, or `torchrun --nproc_per_node=8 engine/train.py ...`.

The loop reads in time order. Step s evaluates, samples and saves with the weights that s updates made, then makes one
more update; a last pass evaluates and saves the final weights. Nothing imports this file.
"""

import os
import sys
from contextlib import closing
from pathlib import Path

if __name__ == "__main__" and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # run as a file: import as from the repository root

import torch
from torch import Tensor, nn

from engine import data, distributed, evaluation, memory, metrics, optim, plots, precision, replicas, runs, tokenizer
from engine.config import TrainConfig, batch_shape, parse
from engine.distributed import Ranks
from engine.errors import BAD_INPUT, DIVERGED, DONE, INTERRUPTED, LOST, STOPPED, BadInput, Diverged, Lost
from engine.guard import OUT_OF_TIME, Guard, Mailbox
from engine.saver import Saver
from engine.stopping import Stop, under_torchrun
from engine.timing import Clock
from engine.tracing import Trace, phase
from engine.watch import Watch
from model.gpt2 import GPT2


def train(config: TrainConfig, ranks: Ranks, stop: Stop) -> str | None:
    """Trains one run to its end, or until it is asked to stop. Returns the reason if it stopped early."""
    with ranks.together():
        words = tokenizer.load(data.tokenizer_name(config.data))
        runs.check_vocabulary(config, words)
        shape = micro_batch_size, accumulation = batch_shape(config, ranks.world_size)
        train_stream = data.TokenStream.open(config.data, "train", words.vocab_size)
        val_stream = data.TokenStream.open(config.data, "val", words.vocab_size)
        val_windows = evaluation.windows(val_stream, config)
        part = ranks.rank, ranks.world_size
        on_gpu = ranks.device.type == "cuda"
        batches = data.Batches(train_stream, config.sequence_length, *shape, config.seed, *part, pin=on_gpu)
        arithmetic, why = precision.choose(config.precision, ranks.device)
    identity = runs.identity(config, words.name, data.digest([train_stream, val_stream], config.data))
    ranks.check_alike(runs.facts(config, identity))
    found = None
    with ranks.together():
        if ranks.is_first:  # the one that writes OUT, which other hosts need not even see
            runs.open_out(config)
            found = runs.find_checkpoint(config, identity, ranks.say)
    found, arithmetic, why = ranks.agree((found, arithmetic, why))
    start, tokens_before = (0, 0) if found is None else (found.step, found.state["tokens"])
    if start == config.num_steps:
        ranks.say(runs.report(config, words.unit, "this run is complete"))
        return None

    runs.check_shared_out(config, ranks)
    torch.manual_seed(config.seed)
    raw_model = GPT2(config.model)  # the one that is saved, evaluated and sampled
    with ranks.together():
        if ranks.is_first:
            memory.check_disk(config)
            if config.init_from is not None and found is None:
                runs.load_weights(config.init_from, raw_model)
    if config.init_from is not None:
        ranks.broadcast([p.detach() for p in raw_model.parameters()])
    compute_dtype = precision.apply(arithmetic)
    compiled, compile_why = runs.wants_compile(config, ranks.device)
    model = distributed.wrap(raw_model, ranks, config, compiled, compute_dtype)  # the one that is run
    ops = runs.configure(raw_model, config, compute_dtype)
    optimizer = optim.build(raw_model, config)
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=arithmetic == "fp16")
    guard = Guard(config, ranks.device)
    if found is not None:
        runs.restore(found, raw_model, optimizer, ranks)
        if scaler.is_enabled() and found.state["scaler"]:  # it may have run in another precision
            scaler.load_state_dict(found.state["scaler"])
        guard.load_state_dict(found.state.get("guard", guard.state_dict()))

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
    record = metrics.Metrics(config, start, ranks.is_first, words.unit, tokens_before)
    saver = Saver(config, ranks, raw_model, optimizer, record.say)
    clock, mailbox, trace = Clock(ranks.device), Mailbox(), Trace(config, ranks)
    if ranks.world_size > 1 and config.parallel == "ddp":
        clock.watch(raw_model.wte.weight, raw_model.wpe.weight, *raw_model.h[0].parameters())
    equals = replicas.group(model, ranks)
    stopping = None  # why the run stops early, once every rank knows
    alive = Watch(config, ranks, start, micro_batch_size)
    with alive, closing(batches), closing(record), saver, closing(trace):
        for step in range(start, config.num_steps + 1):  # one pass more than updates, for the final weights
            is_last, val_loss = step == config.num_steps, None
            saves = step > start and (is_last or stopping is not None or due(step, config.save_every))
            trace.step(step)
            compares = config.check_replicas_every is not None and (saves or due(step, config.check_replicas_every))
            if compares and (drift := replicas.check(raw_model, ranks, equals)) is not None:
                raise Diverged(f"train: at step {step}: {drift}; nothing of it is saved: the same command goes on")
            if is_last or (due(step, config.eval_every) and stopping is None):
                alive.at(step, "evaluation")
                with clock.part("eval"), phase("evaluation"):
                    val_loss = evaluation.mean_loss(raw_model, val_stream, val_windows, config, ranks)
                    record.log(step, val_loss=val_loss)
                    record.sample(step, runs.sample(raw_model, words, config, ranks))
                    if ranks.is_first:
                        plots.draw(config, record.rows(), words.unit)
            if saves:
                alive.at(step, "saving")
                with clock.part("checkpoint"), phase("checkpoint"):
                    record.sync(row_is_complete=is_last)
                    tokens = record.tokens(step)
                    saver.save(runs.state(step, tokens, val_loss, config, identity, ranks.world_size, scaler, guard))
            if is_last or stopping is not None:
                alive.ends = ("done", "") if is_last else ("stopped", stopping)
                break

            alive.at(step, "data")
            asked = stop.flags(saver.seconds)
            clock.start_step()
            with clock.part("data"), phase("data"):
                micro_batches = batches.at(step)
            alive.at(step, "update")
            lr = optim.learning_rate(step, config)
            numbers = train_step(model, optimizer, scaler, guard, micro_batches, lr, step, asked, config, ranks, clock)
            clock.end_step()
            if due(step, config.log_every):  # .tolist() waits for the GPU: only here
                now = numbers.tolist()
                record.log(step, lr=lr, **metrics.measured(now, clock.read(), config, arithmetic, ranks))
            record.end_step(step)
            if (known := mailbox.exchange(numbers)) is not None:  # the step before's, which need no waiting
                stopping = guard.verdict(known, step)
    ranks.agree(None)  # the last save is whole: torchrun ends all ranks once one has left
    if not is_last:
        ranks.say(f"stopped at step {step} of {config.num_steps} by {stopping} and saved; the same command goes on")
        return stopping
    ranks.say(runs.report(config, words.unit, "done"))
    return None


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    guard: Guard,
    micro_batches: list[tuple[Tensor, Tensor]],
    lr: float,
    step: int,
    asked: tuple[bool, bool],
    config: TrainConfig,
    ranks: Ranks,
    clock: Clock,
) -> Tensor:
    """One update, or none if loss or gradient are not finite. Waits for nothing.

    asked: whether this rank has a signal, and is out of time. Returns numbers that all ranks share, float64, named in
    engine.guard: the mean loss, the norm of the whole gradient before clipping, and what was asked and skipped so far.
    """
    torch.manual_seed(data.derived_seed(config.seed, step, ranks.rank))  # of dropout, so that there is no state to save
    shared = torch.zeros(3, device=ranks.device)  # loss, signals, time-outs: summed over all ranks in one go
    for flag, is_set in enumerate(asked, start=1):
        shared[flag] = float(is_set)
    for index, (tokens, targets) in enumerate(micro_batches):
        is_synchronizing = index == len(micro_batches) - 1
        distributed.synchronize_gradients(model, is_synchronizing)
        tokens, targets = tokens.to(ranks.device, non_blocking=True), targets.to(ranks.device, non_blocking=True)
        with phase("forward"):
            loss = model(tokens, targets) / len(micro_batches)
        with phase("backward"):
            scaler.scale(loss).backward()
        shared[0] += loss.detach()
    clock.synchronized()
    with phase("optimizer"):
        scaler.unscale_(optimizer)
        grad_norm = distributed.clip(model, config.optim.clip)
        shared = ranks.sum(shared)
        mean_loss = shared[:1] / ranks.world_size
        optimizer.found_inf = guard.judge(mean_loss[0], grad_norm)  # 1.0: the fused optimizer changes nothing
        optim.set_learning_rate(optimizer, lr)
        optimizer.step()
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
    return torch.cat([mean_loss.double(), grad_norm.double().reshape(1), shared[1:].double(), guard.counts()])


def due(step: int, every: int | None) -> bool:
    """Whether something done every so many steps is done at this one."""
    return every is not None and step % every == 0


def main(args: list[str]) -> int:
    """Exit code: 0 done, 2 bad input, 3 numbers not to be trusted, 4 a process is lost, 75 stopped early and saved."""
    try:
        config = parse(args, "gpt2 train")
        stop = Stop(config.grace_seconds, config.max_minutes)
        with stop, distributed.process_group(config.timeout_minutes) as ranks:
            stopped_by = train(config, ranks, stop)
    except (BadInput, Diverged, Lost) as error:
        print(error, file=sys.stderr, flush=True)
        if isinstance(error, Lost):
            os._exit(LOST)  # a process group with a lost member may never be taken down
        return BAD_INPUT if isinstance(error, BadInput) else DIVERGED
    except KeyboardInterrupt:  # before or after the loop, which takes it as a request
        print("\ngpt2 train: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return INTERRUPTED
    if stopped_by is None or (stopped_by == OUT_OF_TIME and under_torchrun()):
        return DONE  # torchrun would start a process with any other code again, past the limit
    return STOPPED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
