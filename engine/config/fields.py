"""Fields of a training run's config, with their defaults, and what is wrong with their values."""

import math
import operator
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from engine import flags
from engine.errors import BadInput
from engine.tokens import weights
from model.presets import GPT2Config

FAR = 10_000  # sequences within which a micro-batch that divides the step is looked for
Precision = Literal["auto", "bf16", "fp16", "tf32", "fp32"]
LONGEST_WAIT = 1_000_000  # minutes or seconds, that every timer and every library can hold
GPT_PROMPT = "Hello, I'm a language model,"


@dataclass(frozen=True)
class OptimConfig:
    """AdamW as in the GPT-3 paper, appendix B; or Muon for block matrices, AdamW for the rest."""

    name: Literal["adamw", "muon"] = "adamw"  # muon: learns more per token, takes more time per step
    lr: float = 6e-4  # peak learning rate of AdamW
    muon_lr: float = 0.02  # peak learning rate of Muon, on the same schedule
    muon_momentum: float = 0.95  # decay of Muon's running mean of the gradient
    muon_rows: bool = False  # Muon: also divide rows by a running mean of their size, as NorMuon does
    schedule: Literal["cosine", "wsd"] = "cosine"  # after the warm-up; wsd: constant, then linear decay
    decay_share: float = 0.2  # wsd: share of the run in which the learning rate goes down
    min_lr_ratio: float = 0.1  # final learning rate / peak learning rate
    warmup_tokens: int = 375_000_000  # tokens of linear warm-up; at most a tenth of the run
    beta1: float = 0.9  # decay of AdamW's running mean of the gradient
    beta2: float = 0.95  # decay of AdamW's running mean of the squared gradient
    eps: float = 1e-8  # added to the square root of AdamW's running mean of the squared gradient
    weight_decay: float = 0.1  # for matrices and embeddings; biases and LayerNorm have none
    clip: float = 1.0  # maximum norm of the whole gradient

    def problems(self) -> list[str]:
        """Error messages for all fields with invalid values; empty if there are none."""
        wrong = []
        for name in ("muon_lr", "min_lr_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                wrong.append(f"{flag_of('optim.' + name)} must be 0 to 1, got {getattr(self, name)}")
        if not 0 < self.decay_share <= 1:
            wrong.append(f"--optim.decay-share must be above 0 and at most 1, got {self.decay_share}")
        if self.muon_rows and self.name != "muon":
            wrong.append(f"--optim.muon-rows must go with --optim.name muon, got {self.name}; leave one of them out")
        for name in ("beta1", "beta2", "muon_momentum"):
            if not 0 <= getattr(self, name) < 1:
                wrong.append(f"{flag_of('optim.' + name)} must be at least 0 and below 1, got {getattr(self, name)}")
        for name in ("lr", "clip", "eps"):
            if not 0 < getattr(self, name) < math.inf:  # this form rejects NaN too
                advice = "; 1e9 clips nothing" if name == "clip" else ""
                wrong.append(
                    f"{flag_of('optim.' + name)} must be above 0 and finite, got {getattr(self, name)}{advice}"
                )
        for name in ("weight_decay", "warmup_tokens"):
            if not 0 <= getattr(self, name) < math.inf:
                wrong.append(f"{flag_of('optim.' + name)} must be at least 0 and finite, got {getattr(self, name)}")
        return wrong


@dataclass(frozen=True)
class TrainConfig:
    """Trains a GPT-2 on token shards made by `gpt2 prepare`."""

    data: str = "data/fineweb-edu"  # directory of token shards, or several with weights: a:0.7 b:0.3
    out: str = "runs/gpt2"  # run directory: config, metrics, samples, plots, checkpoints
    num_steps: int = 19_073  # optimizer steps; 19,073 * 524,288 tokens = 10.0 billion
    tokens_per_step: int = 524_288  # tokens per optimizer step, over all GPUs
    context: int | None = None  # tokens per sequence; None: the model's n_positions
    document_mask: bool = False  # attention stays inside a document: it does not cross an end-of-text token
    document_positions: bool = False  # each document's positions begin at 0; needs --document-mask
    micro_batch_size: int | None = None  # sequences per forward pass of one process; auto or None: by GPU memory
    precision: Precision = "auto"  # auto: bf16 where it is fast, else fp32
    kernels: Literal["auto", "triton", "torch"] = "auto"  # auto: triton where it runs, else torch
    compile: bool | None = None  # --compile or --no-compile; None: on a GPU only
    cuda_graphs: bool = False  # replay each micro-batch as CUDA graphs, for fewer launches
    deterministic: bool = False  # the same bits in every run on the same GPUs and versions; costs a little time
    strict: bool = False  # end the run, exit code 3, if what torch.compile made is wrong; if not, train uncompiled
    tuned: str = "auto"  # file of gpt2 tune, which sets what no flag sets; auto: this machine's, if any; never: none
    parallel: Literal["ddp", "fsdp", "hsdp"] = "ddp"  # ddp: replicas; fsdp: one sharded model; hsdp: sharded replicas
    shard_size: int | None = None  # hsdp: processes per replica; None: those of one host
    reshard: bool = True  # fsdp, hsdp: free gathered weights after a block's forward; if not, after its backward
    head: Literal["full", "sampled"] = "full"  # sampled: train on a sample of the vocabulary, on a CPU only
    recompute: Literal["none", "attention", "block"] = "none"  # activations recomputed in the backward, to save memory
    seed: int = 1  # seed of the initial weights, the data order and dropout
    resume: str = "auto"  # auto: newest whole checkpoint; never: move that run aside; a path: go back to it, once
    resume_changed: bool = False  # go on although the data, or settings that change what is computed, have changed
    init_from: str | None = None  # initial weights: a run, a Hugging Face directory, nanoGPT's ckpt.pt, or a GPT-2 name
    eval_every: int | None = 250  # steps between validations, samples and plots; None: only at the end
    eval_tokens: int = 1_048_576  # tokens per validation, the same each time
    hellaswag: str | None = None  # HellaSwag's .jsonl file: accuracies in llm.c's convention; None: not evaluated
    hellaswag_every: int | None = None  # steps between those, a multiple of --eval-every; None: at each validation
    hellaswag_limit: int | None = None  # first examples of that file to evaluate; None: all
    lambada: str | None = None  # LAMBADA's .jsonl file, evaluated at each validation; None: not evaluated
    save_every: int | None = 500  # steps between checkpoints; None: only at the end
    save_every_minutes: float | None = 30.0  # also save when so many minutes have passed since the last; None: never
    keep_last: int = 2  # newest checkpoints to keep, besides the one with the lowest validation loss
    async_save: bool = True  # write checkpoints in a thread while training goes on
    max_minutes: float | None = None  # minutes from launch before which to save and stop; None: no limit
    grace_seconds: float = 25.0  # seconds from a signal to the exit at the latest; none for a terminal's Ctrl-C
    timeout_minutes: float = 10.0  # minutes without progress of any rank after which all give up
    max_skipped: int = 20  # consecutive skipped updates (loss or gradient not finite) after which the run stops
    skip_z_score: float | None = None  # also skip a loss this many deviations above its running mean; None: never
    check_replicas_every: int | None = 100  # steps between bitwise comparisons of the replicas' weights; None: never
    log_every: int = 10  # steps between rows of training loss, speed and memory; printed at most every 5 s
    tensorboard: bool = False  # also write TensorBoard events to OUT/tensorboard
    wandb: bool = False  # also send the metrics to Weights & Biases
    profile: str | None = None  # START:STOP: trace steps START to STOP - 1 into OUT, for ui.perfetto.dev
    prompt: str = GPT_PROMPT  # prompt of the samples
    sample_tokens: int = 64  # tokens per sample
    model: GPT2Config = field(default_factory=GPT2Config)
    optim: OptimConfig = field(default_factory=OptimConfig)

    @property
    def name(self) -> str:
        """The run's name: the last part of --out."""
        return Path(self.out).name

    @property
    def sequence_length(self) -> int:
        """T: tokens per sequence."""
        return self.model.n_positions if self.context is None else self.context

    def problems(self) -> list[str]:
        """Error messages for all fields with invalid values; empty if there are none."""
        wrong = []
        for name in (
            "num_steps",
            "tokens_per_step",
            "eval_tokens",
            "keep_last",
            "log_every",
            "sample_tokens",
            "max_skipped",
        ):
            if getattr(self, name) < 1:
                wrong.append(f"{flag_of(name)} must be at least 1, got {getattr(self, name)}")
        for name in (
            "context",
            "micro_batch_size",
            "eval_every",
            "hellaswag_every",
            "hellaswag_limit",
            "save_every",
            "shard_size",
            "check_replicas_every",
        ):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                wrong.append(f"{flag_of(name)} must be at least 1, got {getattr(self, name)}")
        for name in ("out", "tuned", "resume", "init_from", "hellaswag", "lambada"):  # weights.parse checks data
            if "\0" in (getattr(self, name) or ""):
                wrong.append(f"{flag_of(name)} must have no NUL character, got {getattr(self, name)!r}")
        wrong += self._wrong_tasks() + self._wrong_head()
        if self.document_positions and not self.document_mask:
            wrong.append("--document-positions must go with --document-mask, got none; add it")
        if self.skip_z_score is not None and not 0 < self.skip_z_score < math.inf:
            wrong.append(f"--skip-z-score must be above 0 and finite, got {self.skip_z_score}; None: no limit")
        for name in ("grace_seconds", "timeout_minutes", "max_minutes", "save_every_minutes"):
            value, may_be_none = getattr(self, name), name in ("max_minutes", "save_every_minutes")
            if not (may_be_none and value is None) and not 0 < value <= LONGEST_WAIT:
                advice = "; None: no limit" if may_be_none else ""
                wrong.append(f"{flag_of(name)} must be above 0 and at most {LONGEST_WAIT:,}, got {value}{advice}")
        if self.cuda_graphs and (self.parallel != "ddp" or self.compile is False):
            got = "--no-compile" if self.compile is False else f"--parallel {self.parallel}"
            wrong.append(f"--cuda-graphs must go with --compile and --parallel ddp, got {got}; leave one of them out")
        if self.sequence_length > self.model.n_positions:
            wrong.append(
                f"--context must be at most the model's {self.model.n_positions} positions, got "
                f"{self.sequence_length}; lower it{'' if self.init_from else ' or raise --model.n-positions'}"
            )
        wrong += flags.too_large(self) + self.optim.problems()
        for parse, text in ((weights.parse, self.data), (parse_profile, self.profile)):
            try:
                _ = text is None or parse(text)
            except (BadInput, ValueError) as error:
                wrong.append(str(error))
        if not self.prompt:
            wrong.append("--prompt must have at least one character, got none")
        return wrong

    def _wrong_head(self) -> list[str]:
        """An error message if --head sampled is given with what it does not go with."""
        if self.head == "full" or (self.parallel == "ddp" and not self.compile):
            return []
        got = "--compile" if self.compile else f"--parallel {self.parallel}"
        return [f"--head sampled must go with --no-compile and --parallel ddp, got {got}; leave one of them out"]

    def _wrong_tasks(self) -> list[str]:
        """Error messages for flags of HellaSwag that do not go together."""
        wrong, every = [], self.hellaswag_every
        if self.hellaswag is None:
            alone = [name for name in ("hellaswag_every", "hellaswag_limit") if getattr(self, name) is not None]
            return [f"{flag_of(name)} must go with --hellaswag FILE, got none; add it" for name in alone]
        if every is not None and every > 0 and (not self.eval_every or every % self.eval_every):
            wrong.append(
                f"--hellaswag-every must be a multiple of --eval-every {self.eval_every}, got {every}; change one of "
                "them, or leave it out to evaluate at each validation"
            )
        return wrong


# Fields that a run reads only with some values of another field.
READ_WITH = {
    "optim.muon_lr": ("optim.name", ("muon",)),
    "optim.muon_momentum": ("optim.name", ("muon",)),
    "optim.muon_rows": ("optim.name", ("muon",)),
    "optim.decay_share": ("optim.schedule", ("wsd",)),
    "shard_size": ("parallel", ("hsdp",)),
    "reshard": ("parallel", ("fsdp", "hsdp")),
}


def is_read(name: str, config: TrainConfig) -> bool:
    """Whether a run reads the field of this dotted name."""
    decides, values = READ_WITH.get(name, (None, ()))
    return decides is None or operator.attrgetter(decides)(config) in values


def flag_of(name: str) -> str:
    """The flag of a field."""
    return "--" + name.replace("_", "-")


def parse_profile(text: str) -> tuple[int, int]:
    """(START, STOP) of "START:STOP", the value of --profile.

    Raises ValueError if it is not two steps in order.
    """
    match = re.fullmatch(r"([0-9]+):([0-9]+)", text)
    if match is None or not int(match[1]) < int(match[2]):
        raise ValueError(
            "--profile must be START:STOP, the first step to trace and the one after the last, such as 10:13, got "
            f"{text!r}"
        )
    return int(match[1]), int(match[2])


def batch_shape(config: TrainConfig, world_size: int, most: int = 16) -> tuple[int, int]:
    """(micro_batch_size, accumulation) of each rank.

    These are the sequences per forward pass and the forward passes per step:
    tokens_per_step = context * micro_batch_size * accumulation * world_size. Without
    --micro-batch-size they are at most `most`. Raises BadInput, with the nearest valid values, if
    no integers satisfy this.
    """
    T, wanted = config.sequence_length, config.micro_batch_size
    unit = T * world_size * (wanted or 1)
    if config.tokens_per_step % unit:
        below = config.tokens_per_step // unit * unit
        near = [str(value) for value in (below, below + unit) if value]
        per_rank = config.tokens_per_step // (T * world_size)
        advice = f"the nearest --tokens-per-step are {' and '.join(near)}"
        if wanted and config.tokens_per_step % (T * world_size) == 0:
            below = (size for size in range(wanted - 1, max(0, wanted - FAR), -1) if per_rank % size == 0)
            above = (size for size in range(wanted + 1, min(per_rank, wanted + FAR) + 1) if per_rank % size == 0)
            around = [str(size) for size in (next(below, None), next(above, None)) if size is not None]
            advice += f", the nearest --micro-batch-size {' and '.join(around)}" if around else ""
        raise BadInput(
            f"train: --tokens-per-step must be a multiple of context * micro-batch size * processes = "
            f"{T} * {wanted or 1} * {world_size} = {unit}, got {config.tokens_per_step}; {advice}"
        )
    per_rank = config.tokens_per_step // (T * world_size)  # sequences
    size = wanted or max(size for size in range(1, min(most, per_rank) + 1) if per_rank % size == 0)
    return size, per_rank // size
