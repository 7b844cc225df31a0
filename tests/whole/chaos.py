"""Kills a run at random until it is done: `python tests/whole/chaos.py --seconds 120 --processes 2`.

First makes an undisturbed run. Then makes the same run again and every 2 to 12 seconds sends a signal of SIGNALS to
torchrun, to one worker or to all of them; the same command then starts the run again. torchrun itself dies of some
of them. Its workers, if they were asked too, must then end by themselves; a cluster would end the others. Now and then
starts the same command beside the living run instead, which must be refused.
Both runs must end with the same rows, samples, weights and moments, to the bit. The last line says so. Exit code 1 if
they differ.
"""

import argparse
import contextlib
import json
import os
import random
import resource
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

from engine import lock  # noqa: E402
from engine.tokens.prepare import PrepareConfig, prepare  # noqa: E402

SIGNALS = [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
SIGNALS += [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU, signal.SIGQUIT]
SECOND_WRITERS = 0.25  # fraction of the disturbances
TRAINING = 0.8  # of the starts are left alone until they train
END = 60.0  # seconds in which workers that were asked to must have saved and ended


def disturb(launcher: subprocess.Popen, draw: random.Random) -> str:
    """Sends one signal to one of the run's processes, or to all, and waits until all have ended.

    Returns a description of it. Raises AssertionError if workers that were asked to end do not.
    """
    ranks = workers(launcher)
    number = draw.choice(SIGNALS)
    victim = draw.choice(["all", "launcher", *(f"rank {rank}" for rank in sorted(ranks))])
    targets = {"all": [launcher.pid, *ranks.values()], "launcher": [launcher.pid]}
    for pid in targets.get(victim) or [ranks[int(victim.split()[1])]]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    launcher.wait()
    asked = victim != "launcher"
    deadline = time.monotonic() + (END if asked else 1.0)
    while (orphans := [pid for pid in ranks.values() if is_alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in orphans:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    done = f"{number.name} to {victim}" + (f", killed {len(orphans)} orphans" if orphans else "")
    assert not (asked and orphans), f"{done}: workers must end within {END:g} s"
    return done


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended may be left as a zombie by a container's first process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def write_beside(out: Path, launcher: subprocess.Popen, command: list[str]) -> str | None:
    """Starts the same command beside the living run. Returns a description; None if that run writes nothing yet.

    Raises AssertionError unless the second one is refused and leaves the lock alone.
    """
    before = lock._read_at(out / lock.NAME) or {}
    if before.get("pid") not in workers(launcher).values():
        return None
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    if launcher.poll() is not None:
        return None
    assert done.returncode != 0, "a second writer ended with 0"
    assert f"must have one writer, got process {before['pid']} of host" in done.stderr, done.stderr
    assert lock._read_at(out / lock.NAME)["nonce"] == before["nonce"], "a second writer took the lock"
    assert not out.with_name(f"{out.name}.old1").exists(), "a second writer moved the run aside"
    return "a second writer was refused"


def wait_for_steps(out: Path, launcher: subprocess.Popen, since: float) -> None:
    """Waits until the run trains, or has ended, or for a minute: a start takes seconds on a busy machine."""
    heartbeat, until = out / "heartbeat", time.monotonic() + 60
    while launcher.poll() is None and time.monotonic() < until:
        if heartbeat.exists() and heartbeat.stat().st_mtime > since:
            return
        time.sleep(0.1)


def main() -> int:
    """Runs both and compares them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120, help="least time for which the run is disturbed")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the disturbances")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # some of the signals write a core file
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
            *("--model.dropout", "0.1", "--micro-batch-size", "2"),  # two micro-batches per rank
            *files,
        ]

    began = time.monotonic()
    subprocess.run(command("quiet"), env=ENVIRONMENT, check=True, capture_output=True)
    print(f"the quiet run took {time.monotonic() - began:.0f} s", flush=True)
    began, starts = time.monotonic(), 0
    out, code = root / "killed", None
    while code != 0:
        with (root / f"log{starts}").open("w") as log:
            launcher = subprocess.Popen(command("killed"), env=ENVIRONMENT, stdout=log, stderr=log)
        if draw.random() < TRAINING:
            wait_for_steps(out, launcher, time.time())
        starts += 1
        while True:
            try:
                code = launcher.wait(draw.uniform(2, 12) if time.monotonic() - began < options.seconds else None)
                break
            except subprocess.TimeoutExpired:
                done = None
            try:
                if draw.random() < SECOND_WRITERS:
                    again = ["--resume", "never"] if draw.random() < 0.5 else []
                    done = write_beside(out, launcher, [*command("killed"), *again])
                if was_disturbed := done is None:
                    done = disturb(launcher, draw)
            except AssertionError as error:
                print(f"see {root}/log{starts - 1}: {error}")
                return 1
            heartbeat = out / "heartbeat"
            step = json.loads(heartbeat.read_text())["step"] if heartbeat.exists() else 0
            print(f"{time.monotonic() - began:5.0f} s  about step {step:4}  {done}", flush=True)
            if was_disturbed:
                break
        if code:
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
