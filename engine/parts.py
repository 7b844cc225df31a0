"""Run, and what it is made of: the parts that own a training run's data, past and record.

engine.start makes them; the loop in engine.train uses them.
"""

import math
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch.distributed as dist
from torch import Tensor

from engine import config as configs
from engine import distributed, evaluation
from engine.checks import compiler, facts
from engine.checks.cache import CompileCache
from engine.config import TrainConfig
from engine.distributed import Ranks
from engine.errors import Diverged, warn
from engine.health import replicas
from engine.health.heartbeat import Heartbeat
from engine.health.timing import Part, Trace, phase
from engine.run import resume
from engine.run.checkpoint import Checkpoint
from engine.run.header import Corpus
from engine.run.metrics import Metrics
from engine.run.plots import Painter
from engine.run.saver import Saver
from engine.step import Mailbox, Step
from engine.tasks.scoring import Task, batches
from engine.tokens import mixture
from engine.tokens.batches import Batches
from engine.tokens.mixture import Stream, members
from engine.tokens.tokenizer import Tokenizer
from model.generate import NotFinite
from model.gpt2 import GPT2

WAY_OUT = "--no-compile trains without it from the start; please report this with the versions that gpt2 doctor prints"

LOWER = (
    "nothing of it is saved: run again with a lower --optim.lr, and with --resume-changed too if a checkpoint was saved"
)


@dataclass
class Data:
    """What a run reads: its tokenizer, both splits, and the batches of this rank."""

    tokenizer: Tokenizer
    train_stream: Stream
    val_stream: Stream
    val_windows: np.ndarray  # numbers of the validation windows
    micro_batch_size: int  # B, sequences per forward pass of this rank
    accumulation: int  # micro-batches per step of this rank
    batches: Batches
    tasks: list[Task] = field(default_factory=list)  # question sets of the evaluations

    def sizes(self, config: TrainConfig) -> Corpus:
        """Sizes as the header prints them."""
        evaluated, shape = len(self.val_windows) * config.sequence_length, (self.micro_batch_size, self.accumulation)
        stream = self.train_stream
        sets = [(one.directory, one.parts, len(one.stream)) for one in members(stream, config.sequence_length)]
        return Corpus(self.tokenizer.unit, len(stream), len(self.val_stream), evaluated, *shape, stream.origin, sets)

    def task_sizes(self) -> tuple[int, int]:
        """(batches, tokens) of all tasks, over all ranks."""
        requests = [task.requests for task in self.tasks]
        num_tokens = sum(len(one.tokens) for task in requests for one in task)
        return sum(len(batches(task)) for task in requests), num_tokens


@dataclass
class Past:
    """Where a run begins: at step 0, or where its checkpoint left off."""

    identity: dict  # what the run must share with its past, see resume.identity
    checkpoint: Checkpoint | None
    step: int  # updates done
    tokens: int  # tokens trained on so far
    is_complete: bool = False  # whether every step is done, and what it came to is known


@dataclass
class Run:
    """One training run: owns its parts, closes them, and knows what a checkpoint must hold."""

    config: TrainConfig
    ranks: Ranks
    data: Data
    past: Past
    precision: str  # "auto" resolved
    is_compiled: bool
    raw_model: GPT2  # the one that is saved, evaluated and sampled
    update: Step  # holds the compiled and wrapped model, which is the one that trains
    heartbeat: Heartbeat
    replica_group: dist.ProcessGroup | None
    trained_positions: int  # positions that any update may have used: the longest context so far
    mailbox: Mailbox = field(default_factory=Mailbox)
    record: Metrics = field(init=False)  # this and what follows: see open_record
    painter: Painter = field(init=False)
    saver: Saver = field(init=False)
    trace: Trace = field(init=False)

    def state(self, step: int, val_loss: float | None) -> dict:
        """What a checkpoint holds besides weights and optimizer, as JSON types.

        Waits for the device.
        """
        return {
            "step": step,
            "tokens": self.record.tokens(step),
            "trained_positions": self.trained_positions,
            "val_loss": val_loss,
            "identity": self.past.identity,
            "config": configs.to_dict(self.config),
            "world_size": self.ranks.world_size,
            "scaler": self.update.scaler.state_dict(),
            "guard": self.update.guard.state_dict(),
        }

    def load(self, checkpoint: Checkpoint) -> None:
        """Fills weights, optimizer, loss scale and guard.

        Raises BadInput if the checkpoint is another model's.
        """
        resume.restore(checkpoint, self.raw_model, self.update.optimizer, self.ranks)
        resume.restore_counts(checkpoint, self.update.scaler, self.update.guard)

    @contextmanager
    def doing(self, what: Part, step: int) -> Iterator[None]:
        """Tells heartbeat, clock, pace and trace what the loop does inside."""
        self.heartbeat.at(step, what)
        with self.record.pace.part(what), self.update.clock.part(what), phase(what):
            yield

    def progress(self) -> None:
        """Marks progress inside a part: a micro-batch, a batch of an evaluation, a token of a sample."""
        self.heartbeat.progress()
        self.record.progress()

    @contextmanager
    def compiling(self, step: int, batch: tuple[Tensor, Tensor]) -> Iterator[None]:
        """Around the first update of a compiled model: checks what is compiled, and keeps it with the run.

        A model that is compiled wrongly trains uncompiled. Raises Diverged instead with --strict.
        """
        if step > self.past.step or not self.is_compiled:
            yield
            return
        self.heartbeat.at(step, "compiling")
        ranks, update = self.ranks, self.update
        kept = CompileCache(self.config.out, self.compiled_from(), ranks.rank, warn)
        was_kept, began = kept.load(), time.perf_counter()
        is_right, text = compiler.check(update.model, self.raw_model, batch, ranks)
        if is_right:
            how = "loaded from --out" if was_kept else "compiled"
            ranks.print0(f"compile: {text} ({how} in {time.perf_counter() - began:.0f} s)")
        elif self.config.strict:
            raise Diverged(f"train: the compiled model must train as the uncompiled one, got: {text}; {WAY_OUT}")
        else:
            update.model, self.is_compiled = distributed.uncompiled(update.model), False
            if ranks.is_first:
                warn(f"train: TORCH.COMPILE IS NOT USED: {text}; {WAY_OUT}")
            ranks.print0(f"compile: off, {text}: steps run uncompiled")
        self.record.pace.compiled()
        yield
        if self.is_compiled:
            kept.save()

    def compiled_from(self) -> dict:
        """What compiled code depends on, as JSON types."""
        fields = configs.to_dict(self.config)
        names = ("model", "context", "parallel", "shard_size", "reshard", "recompute", "cuda_graphs", "deterministic")
        names += ("document_mask", "document_positions")
        return {name: fields[name] for name in names} | {
            "precision": self.precision,
            "batch": self.data.micro_batch_size,
            "processes": self.ranks.world_size,
            "ops": [choice.implementation for choice in self.raw_model.ops.choices],
            "code": facts.code("kernels/*.py", "model/*.py"),
            **facts.machine(self.ranks.device),
        }

    def evaluate(self, step: int) -> float | None:
        """Validation loss in nats per token, recorded with a sample and the plots. All ranks call it.

        None, and nothing is recorded, if a request to stop came meanwhile. Raises Diverged, on every
        rank, if the loss or a logit of the sample is not finite.
        """
        config, data, model, record = self.config, self.data, self.raw_model, self.record
        context, progress, text, problem = config.sequence_length, self.progress, "", None
        inputs = (model, data.val_stream, data.val_windows, context, self.ranks, progress)
        losses = evaluation.mean_losses(*inputs, self.update.is_interrupted)
        loss = None if losses is None else mixture.mean(data.val_stream, losses)
        figures = self.figures(step) if loss is not None and math.isfinite(loss) else {}
        if loss is None or figures is None:
            return None
        record.log(step, val_loss=loss, **mixture.by_set(data.val_stream, "val_loss", losses), **figures)
        if not math.isfinite(loss):
            raise Diverged(f"train: the validation loss must be finite, got {loss} at step {step}; {LOWER}")
        is_sharded = distributed.is_sharded(model)  # which runs on all ranks or on none

        def goes_on() -> bool:
            progress()
            return is_sharded or not self.update.is_interrupted()

        options = {"context": context, "seed": config.seed, "goes_on": goes_on}
        try:
            if self.ranks.is_first or is_sharded:
                text = evaluation.sample(model, data.tokenizer, config.prompt, config.sample_tokens, **options)
        except NotFinite as error:
            problem = str(error)
        if (problem := self.ranks.broadcast_object(problem)) is not None:  # rank 0 may be the only one that samples
            raise Diverged(f"train: at step {step}: {problem}; {LOWER}")
        record.sample(step, text)
        if self.ranks.is_first:
            self.painter.draw(record.rows())
        return loss

    def figures(self, step: int) -> dict[str, float] | None:
        """Figures of the question sets that are due, such as hellaswag_acc. All ranks call it.

        None if a request to stop came meanwhile. Raises Diverged if a score is not finite.
        """
        config, found = self.config, {}
        is_rare = config.hellaswag_every is not None and step % config.hellaswag_every and step != config.num_steps
        for task in self.data.tasks:
            if task.name == "hellaswag" and is_rare:
                continue
            try:
                figures = task.run(self.raw_model, self.ranks, self.progress, self.update.is_interrupted)
            except NotFinite as error:
                raise Diverged(f"train: at step {step}: {task.name}: {error}; {LOWER}") from error
            if figures is None:
                return None
            found |= {f"{task.name}_{name}": value for name, value in figures.items()}
        return found

    def check_replicas(self) -> str | None:
        """An error message, the same on every rank, if replicas' weights differ; else None."""
        return replicas.check(self.raw_model, self.ranks, self.replica_group)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Closes every part at the end, also after an exception; then waits for all ranks."""
        # Nested, not an ExitStack: what fails while closing must see the exception before it.
        with (
            closing(self.data.batches),
            closing(self.record),
            closing(self.painter),
            self.saver,
            closing(self.trace),
        ):
            yield
        self.ranks.barrier()  # a rank that exits with a code other than 0 makes torchrun kill the others
