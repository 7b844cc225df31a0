"""Everything before the first step: `build` makes a Run of a config, in time order.

    choices        what gpt2 tune found for this machine, and the precision
    read_data      tokenizer, shards, batches, weights of --init-from: is the input good?
    find_past      the checkpoint to go on from, if any
    build_model    weights, ops, compile, DDP or FSDP, optimizer; filled from the checkpoint
    open_record    metrics, plots, saver, trace

Bad input ends the run here. What needs no model is checked before the GPU is used.
"""

import dataclasses
import functools
from contextlib import ExitStack

import torch

from engine import device, distributed, evaluation, optim
from engine.checks import compiler, scratch
from engine.config import TrainConfig, batch_shape
from engine.distributed import Ranks
from engine.errors import BadInput, warn
from engine.health import replicas
from engine.health.heartbeat import Heartbeat
from engine.health.timing import Clock, Trace
from engine.parts import Data, Past, Run
from engine.run import directory, export, header, resume, settings
from engine.run.metrics import Metrics
from engine.run.plots import Painter
from engine.run.saver import Saver
from engine.step import Guard, Step
from engine.tasks import hellaswag, lambada, scoring
from engine.tasks.scoring import Task
from engine.tokens import mixture
from engine.tokens import tokenizer as tokenizers
from engine.tokens.batches import Batches
from engine.tokens.shards import CHECKED_TOKENS
from engine.tokens.tokenizer import Tokenizer
from engine.tuning import choices, record
from engine.tuning.record import Setup, Tuning
from kernels.sampled import sampled_cross_entropy
from model.gpt2 import GPT2

FREQUENT, SAMPLED = 2048, 1024  # tokens of --head sampled: always computed, and drawn from the others
NO_DOCUMENTS = "--document-mask takes what has none for one document"


def build(config: TrainConfig, ranks: Ranks, heartbeat: Heartbeat, held: ExitStack, began: float) -> Run | None:
    """The run, ready for its first step, or None if it is complete. All ranks call it.

    held: takes the lock of --out, on rank 0. began: time.monotonic() of the launch. Raises BadInput
    if config, data, checkpoint or machine cannot be used.
    """
    tuning, precision = choices.precision_and_tuning(config, ranks)
    if tuning is not None:
        config = record.applied(tuning, config, ranks.world_size)
    most = choices.largest_micro_batch(config, precision[0], ranks)
    with ranks.fail_together():
        data = read_data(config, ranks, most)
        initial = export.initial_weights(config) if ranks.is_first and resume.is_new(config) else None
    heartbeat.at(0, "checkpoint")  # whose files are read whole
    past = find_past(config, data, ranks, precision[0], held)
    heartbeat.open(past.step)
    if past.is_complete:
        heartbeat.ends = ("done", "")
        val_loss = past.checkpoint.state["val_loss"]
        ranks.print0(directory.report(config, data.tokenizer.unit, "this run is complete", past.step, val_loss))
        return None
    heartbeat.at(past.step, "starting")
    scratch.prepare(config.out, ranks)
    choices.use(tuning, ranks.device)
    run = build_model(config, data, past, heartbeat, precision, tuning, initial)
    open_record(run, began)
    return run


def read_data(config: TrainConfig, ranks: Ranks, most: int) -> Data:
    """Opens the shards. most: sequences per forward pass, if the config leaves that open.

    Raises BadInput if they are bad, too few, or of another vocabulary than the model's.
    """
    tokenizer = tokenizers.load(mixture.tokenizer_name(config.data))
    check_vocabulary(config, tokenizer)
    check_head(config, ranks.device)
    device.check_can_train(config, ranks.device)
    device.check_memory(config, ranks.device)
    shape = batch_shape(config, ranks.world_size, most)
    train, val = (mixture.open_stream(config.data, split, tokenizer.vocab_size) for split in ("train", "val"))
    context = config.sequence_length
    windows = evaluation.windows(val, context, config.eval_tokens)
    if config.document_mask and ranks.is_first:
        for one in mixture.members(train, context):
            if not (one.stream.read(0, min(len(one.stream), CHECKED_TOKENS)) == tokenizer.end_of_text).any():
                warn(f"train: {one.directory or config.data} begins without an end-of-text token: {NO_DOCUMENTS}")
    batches = Batches(
        train,
        context=context,
        tokens_per_step=config.tokens_per_step,
        micro_batch_size=shape[0],
        seed=config.seed,
        rank=ranks.rank,
        world_size=ranks.world_size,
        device=ranks.device,
    )
    return Data(tokenizer, train, val, windows, *shape, batches, read_tasks(config, tokenizer))


def read_tasks(config: TrainConfig, tokenizer: Tokenizer) -> list[Task]:
    """The question sets of --hellaswag and --lambada. Raises BadInput if a file is bad."""
    tasks, context = [], config.sequence_length
    if config.hellaswag is not None:
        tasks.append(hellaswag.load(config.hellaswag, "llm.c", tokenizer, context, config.hellaswag_limit))
    if config.lambada is not None:
        tasks.append(lambada.load(config.lambada, tokenizer, context))
    return tasks


def check_vocabulary(config: TrainConfig, tokenizer: Tokenizer) -> None:
    """Raises BadInput unless the model has exactly the tokens of the data's tokenizer."""
    if config.model.vocab_size != tokenizer.vocab_size:
        fit = "weights that fit" if config.init_from else "a preset that fits"
        raise BadInput(
            f"train: the model must have the {tokenizer.vocab_size} tokens of {config.data}'s tokenizer "
            f"{tokenizer.name}, got {config.model.vocab_size}; prepare with another --tokenizer, or choose {fit}"
        )


def check_head(config: TrainConfig, on: torch.device) -> None:
    """Raises BadInput if --head sampled cannot run on this device, or has nothing to leave out."""
    advice = "leave it out"
    if config.head == "sampled" and on.type != "cpu":
        raise BadInput(f"train: --head sampled must run on a CPU, got {on.type}, where it would synchronise; {advice}")
    if config.head == "sampled" and config.model.vocab_size <= FREQUENT + SAMPLED:
        raise BadInput(
            f"train: --head sampled must have a vocabulary of more than the {FREQUENT + SAMPLED:,} tokens that it "
            f"computes, got {config.model.vocab_size}; {advice}"
        )


def find_past(config: TrainConfig, data: Data, ranks: Ranks, precision: str, held: ExitStack) -> Past:
    """Opens and locks --out on rank 0 and finds the checkpoint to go on from.

    Raises BadInput if ranks or runs differ.
    """
    digest = mixture.digest(config.data, [data.train_stream, data.val_stream])
    identity = resume.identity(config, data.tokenizer.name, digest, precision, data.micro_batch_size)
    questions = {f"{task.name} examples": scoring.digest(task.requests) for task in data.tasks}
    ranks.check_alike(resume.facts(config, identity) | questions)
    checkpoint = None
    with ranks.fail_together():
        if ranks.is_first:  # the only rank that writes OUT; other hosts need not see it
            held.enter_context(directory.open_out(config.out, config.resume))
            checkpoint = resume.find_checkpoint(config, identity, ranks.print0)
    checkpoint = ranks.broadcast_object(checkpoint)
    if checkpoint is None:
        return Past(identity, None, step=0, tokens=0)
    is_complete = checkpoint.step == config.num_steps and checkpoint.state.get("val_loss") is not None
    return Past(identity, checkpoint, checkpoint.step, checkpoint.state["tokens"], is_complete)


def first_weights(config: TrainConfig, past: Past, ranks: Ranks, initial: tuple[GPT2, int] | None) -> tuple[GPT2, int]:
    """The raw model, drawn or from --init-from, and how many of its positions are trained once this run has begun.

    initial: of export.initial_weights, on rank 0. Raises BadInput if the disk of --out is too small.
    """
    torch.manual_seed(config.seed)
    raw_model, positions = GPT2(config.model), 0
    with ranks.fail_together():
        if ranks.is_first:
            directory.check_disk(config)
            if past.checkpoint is not None:
                positions = export.trained_positions(past.checkpoint)
            elif config.init_from is not None:
                source, positions = initial or export.initial_weights(config)
                raw_model.load_state_dict(source.state_dict())
    if config.init_from is not None and past.checkpoint is None:
        ranks.broadcast([p.detach() for p in raw_model.parameters()])
    return raw_model, max(config.sequence_length, ranks.broadcast_object(positions))


def build_step(
    config: TrainConfig,
    raw_model: GPT2,
    ranks: Ranks,
    precision: str,
    is_compiled: bool,
    tuned: Setup | None = None,
) -> Step:
    """Wraps the model, gives it its ops and dtype, and makes the optimizer and the guard of its updates.

    precision: "auto" resolved. Raises BadInput if the ops or the parallel mode cannot be used.
    """
    compute_dtype = device.COMPUTE_DTYPES[precision]
    model = distributed.wrap(
        raw_model,
        ranks,
        parallel=config.parallel,
        shard_size=config.shard_size,
        reshard=config.reshard,
        is_compiled=is_compiled,
        compute_dtype=compute_dtype,
    )
    raw_model.configure(choices.ops(config, precision, ranks, tuned), compute_dtype, config.recompute)
    optimizer = optim.build(raw_model, config.optim, replicas.group(model, ranks))
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=precision == "fp16")
    guard, clock = Guard(ranks.device, config.max_skipped, config.skip_z_score), Clock(ranks.device)
    if ranks.world_size > 1 and config.parallel == "ddp":
        clock.watch(raw_model.wte.weight, raw_model.wpe.weight, *raw_model.h[0].parameters())
    return Step(model, optimizer, scaler, guard, config.seed, config.optim.clip, ranks, clock, config.cuda_graphs)


def sample_head(config: TrainConfig, data: Data, raw_model: GPT2) -> str:
    """Makes the model train on a sample of its vocabulary if the config says so. Returns the line that says it."""
    if config.head == "full":
        return ""
    tokens = torch.from_numpy(mixture.frequent(data.train_stream, config.sequence_length, FREQUENT))
    raw_model.training_loss = functools.partial(sampled_cross_entropy, frequent=tokens, size=SAMPLED)
    return (
        f"\nhead: {FREQUENT:,} frequent tokens, a micro-batch's targets and {SAMPLED:,} others drawn for it; "
        f"validation takes all {config.model.vocab_size:,}"
    )


def build_model(
    config: TrainConfig,
    data: Data,
    past: Past,
    heartbeat: Heartbeat,
    precision: tuple[str, str],
    tuning: Tuning | None = None,
    initial: tuple[GPT2, int] | None = None,
) -> Run:
    """Makes model and optimizer, fills them, and prints on rank 0 what will run.

    precision: (name, reason). Raises BadInput if weights, ops or --out cannot be used.
    """
    ranks = heartbeat.ranks
    resume.check_shared_out(config.out, config.parallel, ranks)
    raw_model, positions = first_weights(config, past, ranks, initial)
    if config.document_mask:
        raw_model.mask_documents(data.tokenizer.end_of_text, config.document_positions)
    head = sample_head(config, data, raw_model)
    compute_dtype = device.apply_precision(precision[0])
    is_compiled, compile_why = compiler.wanted(config.compile, config.strict, ranks)
    if config.cuda_graphs:
        device.use_cuda_graphs(ranks.device, is_compiled)
    step = build_step(config, raw_model, ranks, precision[0], is_compiled, tuning.setup if tuning is not None else None)
    group = replicas.group(step.model, ranks)
    run = Run(config, ranks, data, past, precision[0], is_compiled, raw_model, step, heartbeat, group, positions)
    if past.checkpoint is not None:
        heartbeat.at(past.step, "checkpoint")
        run.load(past.checkpoint)
    if choices.is_tried(config, past.checkpoint is None, ranks):
        data = run.data = fitted(config, data, past, step)
    if ranks.is_first:
        resolved = {"precision": run.precision, "micro_batch_size": data.micro_batch_size, "device": ranks.device.type}
        resolved["tuned"] = tuning.key if tuning is not None else None
        history = settings.history(config, past.identity, past.checkpoint)
        directory.write_config(config, data.tokenizer.name, resolved, history)
    runs_on = f"precision: {', '.join(precision)}\nkernels: {raw_model.ops.summary()}\ncompile: {compile_why}{head}"
    runs_on += f"\ngoing on from {past.checkpoint.path}" if past.checkpoint else export.initial_note(config)
    header.show(config, ranks, data.sizes(config), (past.step, past.tokens), compute_dtype, runs_on)
    return run


def fitted(config: TrainConfig, data: Data, past: Past, step: Step) -> Data:
    """The data in micro-batches that fit: of half the size, once, if those chosen do not fit on some rank.

    All ranks call it. The steps' tokens stay the same.
    """
    ranks, B = step.ranks, data.micro_batch_size
    does_fit = step.fits(B, config.sequence_length, data.accumulation)
    if not does_fit:  # out here the error is gone, and with it what its frames held
        device.forget_memory(ranks.device)
    if B == 1 or all(ranks.gather(does_fit)):
        return data
    shape = batch_shape(config, ranks.world_size, B // 2)
    data.batches.close()
    batches = dataclasses.replace(data.batches, micro_batch_size=shape[0])
    past.identity["micro_batch_size"] = shape[0]
    ranks.print0(
        f"memory: micro-batches of {B} sequences do not fit; this run takes {shape[1]} of {shape[0]} in place of "
        f"{data.accumulation}, and the tokens of a step stay the same"
    )
    return dataclasses.replace(data, micro_batch_size=shape[0], accumulation=shape[1], batches=batches)


def open_record(run: Run, began: float) -> None:
    """Opens the run's metrics, plots, saver and trace. The heartbeat begins. began: as in build."""
    config, ranks, past, data = run.config, run.ranks, run.past, run.data
    run.record = Metrics(config, past.step, ranks.is_first, data.tokenizer.unit, past.tokens)
    run.record.pace.sized(began, len(data.val_windows), data.accumulation, ranks.world_size, data.task_sizes())
    run.painter = Painter(config, data.tokenizer.unit, run.record.print0)
    run.saver = Saver(config, ranks, run.raw_model, run.update.optimizer, run.record.print0)
    run.saver.last_step = past.step or None
    run.trace = Trace(config.profile, config.out, ranks)
    run.update.progress = run.progress
    run.heartbeat.begin(data.micro_batch_size)
