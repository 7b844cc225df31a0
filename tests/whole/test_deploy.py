"""Files in deploy/: they parse, their flags exist, and they requeue a run only if it was stopped.

The Dockerfile: what it copies is there, its versions are constraints.txt's, and its user is not root.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT
from setuptools import find_packages

from engine.config import TrainConfig

SLURM, KUBERNETES = ROOT / "deploy" / "train.slurm", ROOT / "deploy" / "train.k8s.yaml"
FIELDS = {"--" + name.replace("_", "-") for name in TrainConfig.__dataclass_fields__}

DOCKERFILE = (ROOT / "Dockerfile").read_text()


def instructions(name: str) -> list[str]:
    """What follows this instruction in the Dockerfile, continued lines joined, in order."""
    joined = re.sub(r"\\\n *", "", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE))
    return re.findall(rf"^{name} (.*)$", joined, re.MULTILINE)


def pod_script() -> str:
    """Bash script of the Job: the block indented below `- |`, found without a YAML parser."""
    after = KUBERNETES.read_text().split("- |\n", 1)[1].splitlines()
    indent = len(after[0]) - len(after[0].lstrip())
    body = []
    for line in after:
        if line.strip() and len(line) - len(line.lstrip()) < indent:
            break
        body.append(line[indent:])
    return "\n".join(body) + "\n"


def stand_in(directory: Path, name: str, body: str) -> None:
    """Writes an executable of this name that runs `body`."""
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def heartbeat(state: str | None) -> str:
    """Line of bash that writes a heartbeat as training does, or `:` without a state."""
    content = json.dumps({"step": 5, "num_steps": 9, "time": 1.0, "state": state, "reason": ""})
    return f"echo '{content}' > \"$OUT/heartbeat\"" if state else ":"


@pytest.mark.parametrize("script", [SLURM.read_text(), pod_script()], ids=["slurm", "kubernetes"])
def test_the_scripts_are_bash_and_every_flag_of_training_exists(script):
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    command = re.search(r"engine/train\.py (.*?[^\\])\n", script, re.DOTALL).group(1)
    flags = set(re.findall(r"(?<!\S)--[a-z][a-z.-]*", command))
    assert {"--data", "--out"} <= flags
    assert flags <= FIELDS


def test_the_job_is_yaml_whose_parts_refer_to_each_other():
    yaml = pytest.importorskip("yaml")
    service, job = yaml.safe_load_all(KUBERNETES.read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["args"] == [pod_script()]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert spec["completions"] == spec["parallelism"] == int(environment["HOSTS"])
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"].items() <= spec["template"]["metadata"]["labels"].items()
    assert f"{job['metadata']['name']}-0.{service['metadata']['name']}:" in pod_script()
    on_exit = spec["podFailurePolicy"]["rules"][0]["onExitCodes"]
    assert (on_exit["containerName"], on_exit["values"]) == (container["name"], [2, 3])
    assert pod["restartPolicy"] == "Never"  # which podFailurePolicy requires
    assert pod["terminationGracePeriodSeconds"] > TrainConfig().grace_seconds
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize(
    ("code", "state", "job", "requeued"),
    [
        (0, "stopped", "RUNNING", True),
        (0, "done", "RUNNING", False),
        (0, "stopped", "COMPLETING", False),
        (1, "stopped", "RUNNING", False),
        (1, "failed", "RUNNING", False),
        (0, None, "RUNNING", False),
    ],
    ids=["stopped", "done", "cancelled", "crashed-since", "failed", "no-heartbeat"],
)
def test_slurm_requeues_a_run_that_was_stopped_and_no_other(tmp_path, code, state, job, requeued):
    stand_in(tmp_path, "bin/srun", f'echo "$@" > arguments; {heartbeat(state)}; exit {code}')
    stand_in(tmp_path, "bin/scontrol", 'if [ "$1" = show ]; then echo host1; else echo "$@" > requeued; fi')
    stand_in(tmp_path, "bin/squeue", f"echo {job}")
    stand_in(tmp_path, ".venv/bin/python", f'exec {shutil.which("python3")} "$@"')
    slurm = {"SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "host[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_END_TIME": ""}
    environment = {**os.environ, **slurm, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "OUT": str(tmp_path)}
    done = subprocess.run(["bash", SLURM, "--seed", "3"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == code
    assert (tmp_path / "requeued").exists() == requeued
    arguments = (tmp_path / "arguments").read_text()
    assert "--nnodes=2" in arguments
    assert "--rdzv-endpoint=host1:22345" in arguments
    assert arguments.endswith("--max-minutes 1430 --seed 3\n")


@pytest.mark.parametrize(
    ("code", "report", "state", "expected"),
    [
        (0, "", "done", 0),
        (0, "", "stopped", 75),
        (0, "", None, 75),
        (1, "  exitcode  : 2 (pid: 9)", "running", 2),
        (1, "  exitcode  : 4 (pid: 9)", "failed", 4),
        (1, "  exitcode  : -9 (pid: 9)", "running", 1),
        (1, "", "running", 1),
    ],
    ids=["done", "stopped", "no-heartbeat", "bad-input", "hang", "killed", "launcher"],
)
def test_a_pod_s_exit_code_says_how_the_run_ended(tmp_path, code, report, state, expected):
    stand_in(tmp_path, "bin/torchrun", f"{heartbeat(state)}; echo '{report}' >&2; exit {code}")
    stand_in(tmp_path, "bin/python", f'exec {shutil.which("python3")} "$@"')
    pod = {"HOSTS": "2", "JOB_COMPLETION_INDEX": "0", "OUT": str(tmp_path)}
    environment = {**os.environ, **pod, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    script = pod_script().replace("/tmp/torchrun.log", str(tmp_path / "torchrun.log"))
    assert subprocess.run(["bash", "-c", script], env=environment, capture_output=True).returncode == expected


@pytest.mark.parametrize("place", ["running", "before torchrun", "between its start and its number"])
def test_a_pod_hands_the_signal_on_once_and_waits_for_the_last_checkpoint(tmp_path, place):
    wait = 'for _ in {1..500}; do [ "$asked" ] && break; sleep 0.02; done; sleep 0.3'  # no longer than a test
    body = f"trap 'echo asked; asked=yes' TERM; echo > $OUT/up; {wait}"
    stand_in(tmp_path, "bin/torchrun", f"{body}; sleep 0.1; echo saved; exit 1")
    pod = {"HOSTS": "2", "JOB_COMPLETION_INDEX": "1", "OUT": str(tmp_path)}
    environment = {**os.environ, **pod, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    script = pod_script().replace("/tmp/torchrun.log", str(tmp_path / "torchrun.log"))
    sent = "until [ -e $OUT/up ]; do sleep 0.01; done; kill -TERM $$\n"  # once torchrun heeds it
    script = {
        "running": script.replace("wait $launcher; code=$?\n", f"{sent}wait $launcher; code=$?\n", 1),
        "before torchrun": script.replace("torchrun --nnodes", "kill -TERM $$\ntorchrun --nnodes"),
        "between its start and its number": script.replace("launcher=$!\n", f"{sent}launcher=$!\n"),
    }[place]
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=20)
    if place == "before torchrun":  # it may end before it heeds signals, and has then started nothing
        assert (done.returncode, done.stdout) in ((143, ""), (1, "asked\nsaved\n"))
    else:
        assert (done.returncode, done.stdout) == (1, "asked\nsaved\n")


# ---- The image ----------------------------------------------------------------------------------------------------


def copied() -> set[str]:
    """What the Dockerfile takes from the repository."""
    return {source for line in instructions("COPY") for source in line.split()[:-1]}


def test_the_image_has_every_package_and_what_setup_py_reads():
    packages = {name.partition(".")[0] for name in find_packages(str(ROOT), include=["kernels", "model", "engine"])}
    assert packages == {"kernels", "model", "engine"}
    assert copied() == packages | {"constraints.txt", "setup.py", "pyproject.toml", "LICENSE"}
    assert all((ROOT / name).exists() for name in copied())


def test_what_is_copied_is_what_docker_may_see():
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert (lines[0], lines[-1]) == ("*", "**/__pycache__")
    assert {line.removeprefix("!") for line in lines[1:-1]} == copied()


def test_what_the_image_requires_has_the_versions_that_are_tested():
    installs = [line for line in instructions("RUN") if "pip install" in line]
    assert len(installs) == 2
    assert all(" -c constraints.txt " in line for line in installs)
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    setup = (ROOT / "setup.py").read_text()
    required = re.findall(r'"([a-z]+)[>"]', setup.partition("install_requires=[")[2].partition("]")[0])
    assert {"torch", "triton", "numpy"} <= set(required) <= pinned
    assert "[data]" in installs[1]


def test_the_image_runs_gpt2_as_a_user_who_is_not_root_and_whom_the_job_knows():
    (user,) = instructions("USER")
    assert int(user) > 1000  # Ubuntu's images have a user of their own, 1000
    assert f"useradd --uid {user} " in instructions("RUN")[0]
    assert f"fsGroup: {user} " in KUBERNETES.read_text()
    assert f"workingDir: {instructions('WORKDIR')[0]}\n" in KUBERNETES.read_text()  # where engine/train.py is
    (entry,) = map(json.loads, instructions("ENTRYPOINT"))
    assert f'"{entry[0]}=engine.cli:main"' in (ROOT / "setup.py").read_text()


def test_the_base_and_the_wheels_of_torch_are_build_arguments():
    assert [line.partition("=")[0] for line in instructions("ARG")] == ["BASE", "TORCH_INDEX"]
    assert instructions("FROM") == ["${BASE}"]
    assert {f"--build-arg {name}=" in DOCKERFILE for name in ("BASE", "TORCH_INDEX")} == {True}
