"""Kills a run at random until it is done: `python tests/whole/chaos.py --seconds 120 --processes 2`.

First makes an undisturbed run. Then makes the same run again and every 5 to 15 seconds sends SIGKILL, SIGTERM or SIGINT
to torchrun, to one worker or to all of them; the same command then starts the run again.
Both runs must end with the same rows, samples, weights and moments, to the bit. The last line says so. Exit code 1 if
they differ.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import SMALL  # noqa: E402
from runs import ENVIRONMENT, assert_same_run, workers  # noqa: E402

from engine.tokens.prepare import PrepareConfig, prepare  # noqa: E402


def disturb(launcher: subprocess.Popen, draw: random.Random) -> str:
    """Sends one signal to one of the run's processes, or to all. Returns a description of it."""
    ranks = workers(launcher)
    number = draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
    victim = draw.choice(["all", "launcher", *(f"rank {rank}" for rank in sorted(ranks))])
    targets = {"all": [launcher.pid, *ranks.values()], "launcher": [launcher.pid]}
    for pid in targets.get(victim) or [ranks[int(victim.split()[1])]]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    if victim == "launcher" and number == signal.SIGKILL:  # its workers are orphans; a cluster would end them
        for pid in ranks.values():
            os.kill(pid, signal.SIGKILL)
    return f"{number.name} to {victim}"


def main() -> int:
    """Runs both and compares them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120, help="least time for which the run is disturbed")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the disturbances")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    root = Path(tempfile.mkdtemp(prefix="chaos_"))
    sources = [str(ROOT / name) for name in ("engine", "model", "kernels")]
    prepare(sources, PrepareConfig(out=str(root / "data"), tokenizer="bytes", workers=1, val_fraction=0.2))

    def command(name: str) -> list[str]:
        torchrun = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={options.processes}",
        ]
        faults = ",".join(f"slow:{rank}:0" for rank in range(options.processes))  # 20 steps a second at most
        flags = ["--num-steps", str(int(4 * options.seconds)), "--eval-every", "50", "--save-every", "20"]
        files = ["--data", str(root / "data"), "--out", str(root / name)]
        return [
            *torchrun,
            str(Path(__file__).with_name("faulty.py")),
            faults,
            *SMALL,
            *flags,
            "--model.dropout",
            "0.1",
            *files,
        ]

    began = time.monotonic()
    subprocess.run(command("quiet"), env=ENVIRONMENT, check=True, capture_output=True)
    print(f"the quiet run took {time.monotonic() - began:.0f} s", flush=True)
    began, starts = time.monotonic(), 0
    while True:
        with (root / f"log{starts}").open("w") as log:
            launcher = subprocess.Popen(command("killed"), env=ENVIRONMENT, stdout=log, stderr=log)
        starts += 1
        try:
            code = launcher.wait(draw.uniform(5, 15) if time.monotonic() - began < options.seconds else None)
        except subprocess.TimeoutExpired:
            done = disturb(launcher, draw)
            launcher.wait()
            heartbeat = root / "killed" / "heartbeat"
            step = json.loads(heartbeat.read_text())["step"] if heartbeat.exists() else 0
            print(f"{time.monotonic() - began:5.0f} s  about step {step:4}  {done}", flush=True)
            continue
        if code == 0:
            break
        print(f"start {starts} ended with {code}: see {root}/log{starts - 1}")
        return 1
    print(f"{starts} starts, {time.monotonic() - began:.0f} s")
    try:
        assert_same_run(root / "quiet", root / "killed")
    except AssertionError as error:
        print(f"the runs differ, see {root}: {error}")
        return 1
    print("both runs end with the same rows, samples, weights and moments, to the bit")
    return 0


if __name__ == "__main__":
    sys.exit(main())
