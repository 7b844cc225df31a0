"""Damages one file of ours or of others at a time, and runs the commands that read it.

    python tests/whole/fuzz.py --seed 1 --seconds 60

Each command runs in a fork of this process, which has PyTorch imported. Whatever lies at a file's
place, a command must end within LIMIT seconds of work and MOST bytes, with a documented exit code,
a sentence and no traceback. What a digest does not fit is never loaded, and `verify` finds it. The
same seed makes the same cases, and --seconds decides how many of them. Prints the counts per kind of
file and exit code, then what was wrong.
"""

import argparse
import contextlib
import ctypes
import json
import os
import random
import re
import resource
import shutil
import signal
import stat
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="gpt2_fuzz_")
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch._dynamo
import torch.distributed.checkpoint.hf_storage
import tyro  # noqa: F401  (imported once, not in every fork)
from damage import CONTENT, PLACE, Harm, fit_digests, gone, value

from engine import cli, config, start
from engine.run import checkpoint, plots
from engine.tokens import shards
from engine.tuning import record
from model.gpt2 import GPT2

LIMIT = 10.0  # seconds of work of one command; on a busy machine it may wait longer
PATIENCE = 15.0  # seconds without work after which a command hangs
TICKS = os.sysconf("SC_CLK_TCK")  # per second of work
MOST = 1 << 30  # bytes of memory more than this process has
CODES = {0, 1, 2, 3, 75}
UNCAUGHT = 70  # exit code of a fork whose command raised
SMALL = ["tiny", "--model.n-layer", "1", "--model.n-head", "2", "--model.n-embd", "32", "--model.n-positions", "32"]
SMALL += ["--tokens-per-step", "128", "--micro-batch-size", "2", "--eval-tokens", "128", "--sample-tokens", "4"]
SMALL += ["--optim.name", "adamw", "--precision", "fp32", "--save-every", "2", "--eval-every", "2", "--no-compile"]
PREPARE = ["--tokenizer", "bytes", "--workers", "1", "--val-fraction", "0.3", "--shard-tokens", "9000"]


# ---- One command --------------------------------------------------------------------------------------------------


class Done(NamedTuple):
    """How a command ended."""

    code: int  # exit code, or minus the signal
    out: str
    err: str
    seconds: float  # of work
    grown: int  # bytes of memory more than this process has; an upper bound
    hung: bool


def run(args: list[str], patience: float = PATIENCE) -> Done:
    """Runs a command in a fork and waits for it."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if (child := os.fork()) == 0:
            _in_fork(args, out.fileno(), err.fileno())
        began, worked, hung = time.monotonic(), "", False
        while True:
            done, status, usage = os.wait4(child, os.WNOHANG)
            if done:
                break
            if (work := _work_of(child)) != worked:
                began, worked = time.monotonic(), work
            if not hung and (time.monotonic() > began + patience or sum(map(int, work.split())) > 2 * TICKS * LIMIT):
                hung = True
                os.kill(child, signal.SIGKILL)
            time.sleep(0.005)
        texts = [os.pread(file.fileno(), 1 << 20, 0).decode(errors="replace") for file in (out, err)]
        grown = 1024 * max(0, usage.ru_maxrss - before)
        return Done(os.waitstatus_to_exitcode(status), *texts, usage.ru_utime + usage.ru_stime, grown, hung)


def _work_of(child: int) -> str:
    """User and system time of a process, in ticks."""
    return " ".join(Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[11:13])


def _in_fork(args: list[str], out: int, err: int) -> None:
    code = UNCAUGHT
    try:
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115
        _drop_root_s_rights()
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (in_use + 4 * MOST,) * 2)  # protects the machine
        code = cli.main(args)
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code if isinstance(code, int) else UNCAUGHT)


def _drop_root_s_rights() -> None:
    """Makes permissions hold for root too: without CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""
    libc, header, sets = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if libc.capget(header, sets) == 0:
        sets[0] &= ~0b110
        libc.capset(header, sets)


# ---- Files --------------------------------------------------------------------------------------------------------


def make_files(root: Path) -> None:
    """Makes one of each kind of file, in directories below `root`."""
    (text := root / "text").mkdir()
    words = [f"line {i} of some text, {i * i}\n" for i in range(150)]
    (text / "a.txt").write_text("".join(words))
    (text / "b.jsonl").write_text("".join(json.dumps({"text": word * 9}) + "\n" for word in words))
    with contextlib.suppress(ImportError):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": words}), text / "c.parquet")
    shutil.copytree(text, root / "source")
    _must(["prepare", str(root / "source"), "--out", str(root / "data"), *PREPARE])
    (root / "npy").mkdir()
    for path in (root / "data").glob("*.bin"):
        shards.np.save(root / "npy" / f"{path.stem}.npy", shards.open_shard(path))
    (root / "npy" / shards.MANIFEST).write_text(json.dumps({"tokenizer": "bytes", "shards": _listed(root / "npy")}))
    train = ["train", *SMALL, "--num-steps", "4", "--data", str(root / "data"), "--out"]
    for name in ("run", "back"):
        _must([*train, str(root / name)])
    _must([*train, str(root / "back"), "--resume", str(root / "back" / "checkpoints" / "step_00000002")])
    shutil.copytree(root / "run", root / "sharded", ignore=shutil.ignore_patterns("step_*"))
    _shard(checkpoint.read(root / "run" / "checkpoints" / "step_00000004"), root / "sharded")
    _must(["export", "--run", str(root / "run"), "--out", str(root / "hf")])
    vocabulary = {"model": {"vocab": json.loads((root / "hf" / "vocab.json").read_text())}}
    (root / "hf" / "tokenizer.json").write_text(json.dumps(vocabulary))
    shutil.copytree(root / "hf", root / "index")
    _split(root / "index")
    (root / "tuned").mkdir()
    model, setup = config.parse(SMALL, "gpt2 train").model, record.Setup("fp32", 2)
    cpu = torch.device("cpu")
    tuning = record.Tuning("tiny", record.shape_of(model, 32), record.machine_of(cpu), "today", setup, setup, 1.0, 2.0)
    record.save(tuning, root / "tuned" / "tune.json")


def _must(args: list[str]) -> str:
    done = run(args)
    if done.code != 0:
        raise RuntimeError(f"fuzz: {args} must succeed, got {done.code}: {done.err}")
    return done.out


def _listed(folder: Path) -> list[dict]:
    paths = sorted(folder.glob("*.npy"))
    return [{"file": p.name, "split": p.name.split("_")[1], "sha256": shards.sha256(p)} for p in paths]


def _shard(saved: checkpoint.Checkpoint, out: Path) -> None:
    """Saves a checkpoint once more, as a sharded model's."""
    if (child := os.fork()) == 0:
        try:
            torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
            train = config.load(out)
            model = GPT2(train.model)
            optimizer = start.optim.build(model, train.optim)
            checkpoint.load_weights(saved, model)
            checkpoint.load_optimizer(saved, model, optimizer)
            tensors = checkpoint.named_tensors(model, optimizer)
            checkpoint.write(out, saved.state, tensors, 9, print, torch.distributed.group.WORLD)
            os._exit(0)
        finally:
            traceback.print_exc()
            os._exit(1)
    if os.waitpid(child, 0)[1]:
        raise RuntimeError("fuzz: a sharded checkpoint must be saved")


def _split(folder: Path) -> None:
    """Puts the weights of a directory in two files with an index."""
    from safetensors.torch import load_file, save_file

    tensors, weight_map = load_file(folder / "model.safetensors"), {}
    for number, part in enumerate((list(tensors)[::2], list(tensors)[1::2])):
        name = f"model-0000{number}-of-00002.safetensors"
        save_file({key: tensors[key] for key in part}, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


# ---- Cases --------------------------------------------------------------------------------------------------------

RUN = ("sample", "eval", "plot", "verify", "export", "train", "init")
HF = ("import", "init_hf")
# Kind of file: where it lies, and the commands that read it.
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "config": ("run/config.json", RUN),
    "metrics": ("run/metrics.jsonl", ("plot", "verify", "train")),
    "samples": ("run/samples.txt", ("train", "again")),
    "heartbeat": ("run/heartbeat", ("train",)),
    "latest": ("run/latest", ("train", "verify", "sample")),
    "went_back": ("back/went_back", ("train", "again")),
    "state": ("run/checkpoints/step_00000004/state.json", RUN),
    "manifest": ("run/checkpoints/step_00000004/manifest.json", RUN),
    "weights": ("run/checkpoints/step_00000004/model.safetensors", RUN),
    "optimizer": ("run/checkpoints/step_00000004/optimizer.safetensors", ("train", "verify", "sample")),
    "sharded": ("sharded/checkpoints/step_00000004/sharded/*", ("sample", "eval", "train", "verify", "export")),
    "data": ("data/*.bin", ("verify_data", "eval", "new")),
    "data manifest": ("data/manifest.json", ("verify_data", "eval", "new", "prepared")),
    "npy": ("npy/*.npy", ("verify_data", "eval", "new")),
    "hf config": ("hf/config.json", HF),
    "hf weights": ("hf/model.safetensors", HF),
    "hf index": ("index/model.safetensors.index.json", HF),
    "hf parts": ("index/model-*.safetensors", HF),
    "hf tokenizer": ("hf/tokenizer.json", HF),
    "hf vocabulary": ("hf/vocab.json", HF),
    "tuning": ("tuned/tune.json", ("tuned",)),
    "text": ("text/*", ("prepare",)),
}


@dataclass(frozen=True)
class Case:
    """One damaged file and a command."""

    kind: str
    path: str  # below the directory of files
    harm: Harm
    is_fit: bool  # whether its digest is written anew
    command: str
    seed: int

    def __str__(self) -> str:
        fit = ", digest written anew" if self.is_fit else ""
        return f"{self.path}, {self.harm.__name__} {self.seed}{fit}: {self.command}"


def draw(kind: str, files: Path, rng: random.Random) -> Case:
    """A case of this kind."""
    pattern, commands = KINDS[kind]
    paths = sorted(path for path in files.glob(pattern) if path.is_file())
    harm = rng.choice(CONTENT if rng.random() < 0.65 else PLACE)
    is_fit = harm in CONTENT and rng.random() < (0.8 if harm is value else 0.5)
    path = str(rng.choice(paths).relative_to(files))
    return Case(kind, path, harm, is_fit, rng.choice(commands), rng.randrange(10**6))


def arguments(case: Case, here: Path, files: Path) -> list[str]:
    """The command line of a case, whose files lie in `here`; all else lies in `files`."""
    folder = here / Path(case.path).parts[0]
    data = folder if case.kind in ("data", "data manifest", "npy") else files / "data"
    run = files / "run" if data == folder else folder
    steps = ["--num-steps", "6", "--data", str(data)]
    train = ["train", *SMALL, "--out", str(run), "--data", str(data), "--num-steps"]
    return {
        "sample": ["sample", "--run", str(run), "--prompt", "li", "--max-new-tokens", "4", "--temperature", "0"],
        "eval": ["eval", "--run", str(run), "--data", str(data)],
        "plot": ["plot", "--run", str(run)],
        "export": ["export", "--run", str(run), "--out", str(here / "out")],
        "verify": ["verify", str(run)],
        "train": [*train, "6"],
        "again": [*train, "4"],
        "init": ["train", *SMALL, "--out", str(here / "out"), "--init-from", str(run), *steps],
        "init_hf": ["train", *SMALL, "--out", str(here / "out"), "--init-from", str(folder), *steps],
        "import": ["import", str(folder), "--out", str(here / "out")],
        "new": ["train", *SMALL, "--out", str(here / "out"), *steps],
        "tuned": ["train", *SMALL, "--out", str(here / "out"), *steps, "--tuned", str(folder / "tune.json")],
        "verify_data": ["verify", str(data)],
        "prepare": ["prepare", str(folder), "--out", str(here / "out"), *PREPARE],
        "prepared": ["prepare", str(files / "source"), "--out", str(data), *PREPARE],
    }[case.command]


def is_new(path: Path, original: Path) -> bool:
    """Whether the file at the path is no longer the original."""
    is_file = not path.is_symlink() and path.is_file() and stat.S_IMODE(path.stat().st_mode)
    return not is_file or path.read_bytes() != original.read_bytes()


def wrong(case: Case, done: Done, is_changed: bool, allowed: set[str]) -> str | None:
    """What is wrong with how a command ended, or None. allowed: what may be printed of whole checkpoints."""
    said = done.out + done.err if case.command.startswith("verify") else done.err
    if done.hung or done.seconds > LIMIT:
        return f"HANG: {done.seconds:.1f} s of work"
    if "Traceback" in done.out + done.err or done.code == UNCAUGHT:
        return "TRACEBACK: " + (done.err.strip().splitlines() or ["none"])[-1][:300]
    if done.code not in CODES:
        return f"CODE {done.code}: {done.err[-300:]}"
    if done.code != 0 and not re.search(r"\S+ \S+ \S+", said):
        return f"NO SENTENCE, code {done.code}"
    if done.grown > MOST or "memory" in said:
        return f"MEMORY: {done.grown >> 20} MiB: {said[-200:]}"
    if len(done.err) > 5000:
        return f"LONG: {len(done.err)} characters"
    has_digest = case.kind in ("state", "weights", "optimizer", "sharded", "data", "npy") and not case.is_fit
    if has_digest and is_changed and case.command.startswith("verify") and done.code != 1:
        return f"NOT FOUND by verify: {done.out}"
    if has_digest and is_changed and done.code == 0 and case.kind not in ("data", "npy"):
        if case.command in ("sample", "eval") and shown(done.out) not in allowed:
            return f"LOADED what its digest does not fit: {done.out!r}"
        if case.command == "train" and "going on from" in done.out and "step_00000004\n" in done.out:
            return "LOADED what its digest does not fit"
    return None


def shown(out: str) -> str:
    """What sample or eval printed, without paths."""
    return re.sub(r"/\S+", "PATH", "\n".join(line for line in out.splitlines() if "passing over" not in line)).strip()


def of_whole_checkpoints(files: Path, here: Path) -> set[str]:
    """What sample and eval print of each checkpoint."""
    printed = set()
    for name in ("run", "sharded"):
        for kept in sorted((files / name / "checkpoints").glob("step_*")):
            shutil.copytree(files / name, here / name)
            for other in (here / name / "checkpoints").glob("step_*"):
                if other.name != kept.name:
                    shutil.rmtree(other)
            for command in ("sample", "eval"):
                case = Case(name, f"{name}/config.json", gone, False, command, 0)
                printed.add(shown(_must(arguments(case, here, files))))
            shutil.rmtree(here / name)
    return printed


def fuzz(asked: argparse.Namespace) -> list[str]:
    """Runs cases until the time is over, kind after kind. Returns what was wrong."""
    rng, counts, problems, number = random.Random(asked.seed), Counter(), [], 0
    plots.Painter.draw = lambda self, rows: None  # in training; `gpt2 plot` draws
    with tempfile.TemporaryDirectory(prefix="gpt2_fuzz_") as place:
        root = Path(place)
        (root / "files").mkdir()
        make_files(root / "files")
        allowed = of_whole_checkpoints(root / "files", root / "here")
        began = time.monotonic()
        while time.monotonic() - began < asked.seconds and number < asked.cases:
            case = draw(asked.only or list(KINDS)[number % len(KINDS)], root / "files", rng)
            number += 1
            found, done = _one(case, root / "files", root / "here", allowed, asked.patience)
            counts[case.kind, done.code] += 1
            if found is not None:
                problems.append(f"{case}: {found}")
                print(problems[-1], flush=True)
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)
    codes = sorted({code for _, code in counts})
    print(f"\nseed {asked.seed}: {number} cases\n{'kind of file':<16}" + "".join(f"{code:>7}" for code in codes))
    for kind in KINDS:
        print(f"{kind:<16}" + "".join(f"{counts[kind, code] or '':>7}" for code in codes))
    tally = Counter(problem.split(": ")[2].split()[0] for problem in problems)
    print(f"wrong: {dict(tally) or 'nothing'}")
    return problems


def _one(case: Case, files: Path, here: Path, allowed: set[str], patience: float) -> tuple[str | None, Done]:
    """Damages the file in a copy of its directory, runs the command and judges it."""
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir()
    name, path = Path(case.path).parts[0], here / case.path
    shutil.copytree(files / name, here / name)
    case.harm(path, random.Random(case.seed))
    if case.is_fit:
        with contextlib.suppress(ValueError, RecursionError):  # what is no JSON has no digest inside
            fit_digests(path)
    done = run(arguments(case, here, files), patience)
    return wrong(case, done, is_new(path, files / case.path), allowed), done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("--seed", 1), ("--seconds", 60.0), ("--cases", 10**6)):
        parser.add_argument(name, type=type(default), default=default)
    parser.add_argument("--only", choices=KINDS)
    parser.add_argument("--patience", type=float, default=PATIENCE)
    return int(bool(fuzz(parser.parse_args())))


if __name__ == "__main__":
    sys.exit(main())
