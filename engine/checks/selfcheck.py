"""Self-check of the Triton ops on the GPU in use, once per GPU, driver, versions and code.

Every op that is to run is compared, forward and backward, with its definition in float64, at the
model's widths and dtypes. Another process does it (`python -m engine.checks.selfcheck`), so that an
illegal memory access or a hang ends that process and not the run. Its result is a small file in
$XDG_CACHE_HOME/gpt2-engine; while that cannot be read or written, the check is made at every start.
Attention is checked without dropout.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from engine.checks import facts
from engine.config import TrainConfig
from engine.device import COMPUTE_DTYPES, apply_precision, current, synchronize
from kernels import tiles
from kernels.accuracy import failure
from kernels.cases import Sizes
from kernels.dispatch import Ops
from model.files import read_json

CHILD = ("-m", "engine.checks.selfcheck")
LIMIT = 80.0  # seconds of one such process: most of it compiles kernels
UNFINISHED = "unfinished"  # printed for an op before it is checked
CHANGEABLE = ("out of memory", "OutOfMemoryError", "process")  # failures that may be gone the next time


class Unavailable(Exception):
    """The check could not be made, for a reason that is not the kernels'."""


def request(config: TrainConfig, precision: str, ops: Ops, device: torch.device, tuned: dict | None = None) -> dict:
    """What a run must check, as JSON types: those of its ops that are on Triton, at its widths and dtypes.

    tuned: tiles that `gpt2 tune` found, as kernels.tiles.use takes them.
    """
    # Two blocks of 128 rows without a mask and part of a third. Triton compiles other code for multiples of 16.
    T = 304 if config.sequence_length % 16 == 0 else 301
    # FSDP gathers a block's parameters in the compute dtype, and the head's in float32.
    parameters = torch.float32 if config.parallel == "ddp" else COMPUTE_DTYPES[precision]
    on_triton = [choice.op for choice in ops.choices if choice.implementation == "triton"]
    if config.document_mask and "attention" in on_triton:
        on_triton.append("attention_documents")  # other code of the same kernels
    return {
        "ops": on_triton,
        "sizes": dataclasses.astuple(Sizes.of(config.model, B=2, T=T)),
        "precision": precision,
        "tiles": tuned or {},
        "parameters": str(parameters).removeprefix("torch."),
        "device": str(device),
    }


def failures(asked: dict, say: Callable[[str], None]) -> dict[str, str]:
    """{op: why its Triton kernels are not to be used}, from the last check or a new one.

    say: is told what a new check found.
    """
    if not asked["ops"]:
        return {}
    if (known := recall(asked)) is not None:
        return known
    began = time.monotonic()
    try:
        failed = renew(asked)
    except Unavailable as error:
        say(f"self-check: not made, {error}; the Triton ops are used unchecked")
        return {}
    passed = len(asked["ops"]) - len(failed)
    say(
        f"self-check: {passed} of {len(asked['ops'])} Triton ops agree with their definitions in "
        f"{asked['precision']} ({time.monotonic() - began:.0f} s, once per GPU and version)"
    )
    return failed


def renew(asked: dict) -> dict[str, str]:
    """Makes the check now, and remembers what the next one would find too. Raises Unavailable."""
    failed = check(asked)
    if not any(word in why for why in failed.values() for word in CHANGEABLE):
        remember(asked, failed)
    return failed


def check(asked: dict) -> dict[str, str]:
    """Checks in other processes: one, and after each that an op brings down another for the ops left.

    Raises Unavailable if such a process cannot use the device.
    """
    results: dict[str, str | None] = {}
    while left := [op for op in asked["ops"] if op not in results]:
        found, end = _child(asked | {"ops": left}, LIMIT)
        if not found and not results:
            raise Unavailable(end)
        found = found or dict.fromkeys(left, UNFINISHED)  # an op before has broken the device
        results |= {op: f"does not run here: {end}" if why == UNFINISHED else why for op, why in found.items()}
    return {op.removesuffix("_documents"): why for op, why in results.items() if why is not None}


def _child(asked: dict, seconds: float) -> tuple[dict[str, str | None], str]:
    """({op: failure, None or UNFINISHED} as far as the process came, how it ended)."""
    command = [sys.executable, *CHILD, json.dumps(asked)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(facts.ROOT), os.environ.get("PYTHONPATH", "")])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    try:  # a session of its own: a Ctrl-C asks the run to stop, and is no failure of a kernel
        done = subprocess.run(command, env=environment, timeout=max(1.0, seconds), start_new_session=True, **pipes)
        printed, said = done.stdout, done.stderr.decode(errors="replace").strip().splitlines()
        code = done.returncode
        end = f"its process ended with {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"
        end += f": {said[-1][:200]}" if said else ""
    except subprocess.TimeoutExpired as error:
        printed, end = error.stdout or b"", f"its process did not end within {LIMIT:.0f} s"
    lines = printed.decode(errors="replace").splitlines()
    results = [json.loads(line) for line in lines if line.startswith('{"op"')]  # the last of an op counts
    return {result["op"]: result["failure"] for result in results}, end


def main(asked: dict) -> None:
    """Checks op by op and prints each result at once, as a line of JSON."""
    device = torch.device(asked["device"])
    torch.ones(1, device=device).item()
    dtype, parameters = apply_precision(asked["precision"]), getattr(torch, asked["parameters"])
    sizes = Sizes(*asked["sizes"])
    tiles.use(asked["tiles"])
    for op in asked["ops"]:
        print(json.dumps({"op": op, "failure": UNFINISHED}), flush=True)
        # The head's kernel sees logits only, so it needs no wide hidden states.
        is_head = op == "linear_cross_entropy"
        small, kept = (dataclasses.replace(sizes, B=1, H=1), torch.float32) if is_head else (sizes, parameters)
        print(json.dumps({"op": op, "failure": failure(op, small, dtype, kept, device)}), flush=True)
        synchronize(device)  # after an illegal access nothing runs in this process


# ---- Memory -------------------------------------------------------------------------------------------------------


def recall(asked: dict) -> dict[str, str] | None:
    """The failures that the last check of the same found, or None if there is none that can be read."""
    with suppress(OSError, ValueError):
        stored = read_json(_path(asked), {"facts": dict, "failed": dict[str, str]})
        if stored["facts"] == _facts(asked):
            return stored["failed"]
    return None


def recall_for(config: TrainConfig, precision: str, ops: Ops, tuned: dict | None = None) -> dict[str, str] | None:
    """What is remembered for a run of this config on this machine's first GPU."""
    return recall(request(config, precision, ops, current(), tuned))


def renew_for(config: TrainConfig, precision: str, ops: Ops, tuned: dict | None = None) -> dict[str, str]:
    """Makes the check of a run of this config on this machine's first GPU. Raises Unavailable."""
    return renew(request(config, precision, ops, current(), tuned))


def remember(asked: dict, failed: dict[str, str]) -> None:
    """Writes the result of a check; does nothing where that fails."""
    path = _path(asked)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps({"facts": _facts(asked), "failed": failed}, indent=1) + "\n")
        temporary.replace(path)


def _facts(asked: dict) -> dict:
    rest = {name: value for name, value in asked.items() if name != "device"} | {"sizes": list(asked["sizes"])}
    return rest | facts.machine(torch.device(asked["device"])) | {"code": facts.code("kernels/*.py")}


def _path(asked: dict) -> Path:
    return facts.cache_directory() / f"selfcheck_{facts.key(_facts(asked))}.json"


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
