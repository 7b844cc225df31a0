"""Flags of all commands: from words to a dataclass, with hints for the names that other trainers use.

Imports no PyTorch, so that --help is fast.
"""

import dataclasses
import re
import shlex
from itertools import takewhile
from typing import Any

from engine import output
from engine.errors import BadInput

# Our flag, or another way in, for each name that it has elsewhere. The first that a command has is the hint.
HINTS = (
    ("--optim.lr", "lr learning-rate peak-lr max-lr"),
    ("--optim.min-lr-ratio, the final learning rate / the peak", "min-lr final-lr min-learning-rate"),
    (
        "--optim.warmup-tokens, steps * tokens per step",
        "warmup warmup-steps warmup-iters warmup-ratio lr-warmup-steps num-warmup-steps",
    ),
    ("--optim.weight-decay", "weight-decay wd"),
    ("--optim.clip", "clip grad-clip gradient-clip max-grad-norm clip-grad clip-grad-norm"),
    ("--optim.beta1", "beta1 adam-beta1"),
    ("--optim.beta2", "beta2 adam-beta2"),
    ("--optim.eps", "eps adam-eps adam-epsilon"),
    ("--optim.name", "optimizer optim opt"),
    (
        "--num-steps; an epoch is the training tokens / --tokens-per-step",
        "epoch epochs num-epochs num-train-epochs max-epochs",
    ),
    (
        "--num-steps",
        "steps iters max-steps max-iters num-iters num-iterations train-steps train-iters total-steps max-train-steps",
    ),
    (
        "--tokens-per-step, tokens of one optimizer step, and --micro-batch-size, sequences of one forward pass",
        "batch batch-size train-batch-size global-batch-size total-batch-size per-device-train-batch-size "
        "device-batch-size gradient-accumulation-steps grad-accum grad-accum-steps accumulation",
    ),
    (
        "--context",
        "block-size seq-len seq-length sequence-length max-seq-len max-seq-length context-length context-size ctx",
    ),
    ("--precision", "bf16 fp16 fp32 tf32 amp dtype mixed-precision half"),
    ("--model.dropout", "dropout"),
    ("--model.n-layer", "n-layer n-layers num-layers layers depth"),
    ("--model.n-head", "n-head n-heads num-heads heads"),
    ("--model.n-embd", "n-embd d-model hidden-size width dim"),
    ("--model.n-positions", "n-positions n-ctx max-position-embeddings"),
    ("--model.vocab-size", "vocab-size vocab"),
    ("--run", "model model-path model-name model-name-or-path checkpoint ckpt checkpoint-path run-dir out-dir"),
    ("--out", "out-dir output-dir output save-dir checkpoint-dir ckpt-dir run-dir"),
    ("--data", "data-dir dataset dataset-name data-path train-data train-file train-bin input"),
    ("--eval-every", "eval-interval eval-steps val-every eval-freq val-interval eval-iters-every"),
    ("--eval-tokens", "eval-iters eval-batches max-eval-samples"),
    ("--save-every", "save-interval save-steps checkpoint-every ckpt-every"),
    ("--keep-last", "save-total-limit keep"),
    ("--log-every", "log-interval logging-steps log-freq"),
    ("--resume, which is auto: the same command goes on", "resume-from resume-from-checkpoint load-checkpoint load"),
    ("--init-from", "pretrained from-pretrained init model-name-or-path finetune checkpoint ckpt"),
    ("--recompute", "gradient-checkpointing activation-checkpointing grad-checkpointing"),
    ("--parallel", "fsdp ddp strategy"),
    ("--kernels", "flash flash-attention attn-implementation"),
    ("--wandb or --tensorboard", "report-to wandb-log logger"),
    ("--workers", "num-proc num-workers n-proc processes"),
    ("--max-new-tokens", "length max-length max-tokens num-tokens tokens n-tokens"),
    ("--num-samples", "n samples n-samples num-return-sequences"),
    ("--temperature", "temp t"),
    ("--prompt", "start text input"),
    ("--tokenizer", "encoding tokenizer-name"),
    (
        "--config, a TOML or a run's config.json",
        "config-file config-path config-name cfg cfg-path yaml toml args-file settings hparams from-run",
    ),
    ("--print-config, which prints all settings as TOML", "dump-config show-config save-config print-settings"),
    ("--check, which makes the self-check now", "self-check selfcheck check-kernels test-kernels"),
    ("--json, which prints JSON", "format output-format as-json json-output"),
)
DEVICES = "device devices gpu gpus cuda cpu no-cuda use-cpu num-gpus accelerator"
DEVICE = "CUDA_VISIBLE_DEVICES in front of the command, where 0 is the first GPU, or GPT2_DEVICE=cpu for the CPU"
# Ways in that are no flags: of commands that have this flag, what, for which names.
ELSEWHERE = (
    ("--tokens-per-step", f"{DEVICE}, and torchrun --nproc_per_node=N engine/train.py takes N of them", DEVICES),
    ("--precision", DEVICE, DEVICES),
    ("--run", DEVICE, DEVICES),
    (
        "--micro-batch-size",
        "the word after the command, the preset",
        "preset model model-name config model-size model-type size",
    ),
    ("--tokens-per-step", "prepare's --tokenizer, which the data notes", "tokenizer tokenizer-name"),
)


def parse(kind: type, args: list[str], prog: str, default: Any = None) -> Any:
    """The words as an object of a dataclass. Exits with 2, by tyro, for a flag or value that it does not have.

    default: an object with the values of all flags that are not given. Raises BadInput for a flag
    that other trainers have.
    """
    import tyro

    known = names(kind if default is None else type(default))
    args = joined(args) if "--data" in known else args
    for word in args:
        flag = word.partition("=")[0].replace("_", "-")
        if flag.startswith("--") and flag not in known and (here := hint(flag, known)) is not None:
            raise BadInput(f"{prog}: a flag must be one that --help lists, got {flag}; here it is {here}")
    options = {} if default is None else {"default": default}
    called = prog.replace("gpt2", output.program(), 1) if prog.startswith("gpt2 ") else prog
    return tyro.cli(kind, args=args, prog=called, **options)


def joined(args: list[str], flag: str = "--data") -> list[str]:
    """The words, with several values of a flag as one, quoted as for a shell: a:0.7 b:0.3.

    Raises BadInput if the flag is given twice, or several values and none has a weight.
    """
    places = [index for index, word in enumerate(args) if word.partition("=")[0] == flag]
    if len(places) > 1:
        raise BadInput(f"{flag} must be given once, got it {len(places)} times; write {flag} a:0.7 b:0.3")
    for index in places:
        _, has_value, value = args[index].partition("=")
        more = list(takewhile(lambda one: not one.startswith("-"), args[index + 1 :]))
        if len(values := [value] * bool(has_value) + more) > 1:
            if not any(re.search(r":[+-]?[0-9.]+$", one) for one in values):
                raise BadInput(
                    f"{flag}: each of several sets must have a weight, got none for {', '.join(values)}; write "
                    f"{values[0]}:0.5 for half of the sequences"
                )
            return [*args[:index], flag, shlex.join(values), *args[index + 1 + len(more) :]]
    return args


def checked(kind: type, args: list[str], prog: str) -> Any:
    """The same, of a command without presets. Raises BadInput too for an integer that 64 bits do not hold."""
    asked = parse(kind, args, prog)
    if wrong := too_large(asked):
        raise BadInput(f"{prog.removeprefix('gpt2 ')}: " + "\n  ".join(wrong))
    return asked


def names(kind: type, prefix: str = "--") -> set[str]:
    """Flags of a dataclass, nested ones dotted."""
    found = {"--help"}
    for each in dataclasses.fields(kind):
        name = prefix + each.name.replace("_", "-")
        nested = each.default_factory if dataclasses.is_dataclass(each.default_factory) else None
        found |= {name, f"--no-{name[2:]}"} if nested is None else names(nested, f"{name}.")
    return found


def hint(flag: str, known: set[str]) -> str | None:
    """Our way to say what a flag of another trainer says, or None if there is none."""
    for ours, theirs in HINTS:
        if flag[2:] in theirs.split() and ours.replace(",", " ").replace(";", " ").split()[0] in known:
            return ours
    return next((ours for has, ours, theirs in ELSEWHERE if has in known and flag[2:] in theirs.split()), None)


def too_large(asked: Any, prefix: str = "--") -> list[str]:
    """Error messages for the integers that 64 bits do not hold."""
    wrong = []
    for each in dataclasses.fields(asked):
        value, name = getattr(asked, each.name), prefix + each.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            wrong += too_large(value, f"{name}.")
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            wrong.append(f"{name} must fit into 64 bits, got {value}")
    return wrong
