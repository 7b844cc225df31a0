"""Two commits measured side by side: `python -m bench.compare --commits [BASE [HEAD]] [-k EXPRESSION] [--rounds 5]`.

HEAD is a commit; without it, the working tree if it has changes, and else the newest commit. BASE is by default the
parent of HEAD: for changes in the working tree, the newest commit. Each side is a directory of its own outside the
repository (a git worktree, or a copy of the working tree's files), and the same interpreter runs in it, in turn with
the other: A B, B A, A B, ... one process per side and round. What is compared is the engine: A runs B's bench/ and
pyproject.toml, and a case that needs what A's engine lacks fails there and is only in B, with pytest's reason.

A figure is the median over the rounds of a case's median; its quartiles are those of the rounds.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench import machine
from bench.figures import LEAST_ROUNDS, Figure, Results, pytest_benchmark
from engine.errors import BadInput

EXPRESSION = "tiny and (torch-eager or tokens) and not bf16"
ROUNDS = 5
LIMIT_S = 900  # of one process
PACKAGES = ("kernels", "model", "engine")  # of what is compared
SHARED = ("bench", "pyproject.toml")  # B's are used for both


def measure_both(
    commits: list[str], expression: str, rounds: int, repository: Path = machine.ROOT
) -> tuple[Results, Results]:
    """The figures of both sides. commits: BASE and HEAD, or BASE, or none. Raises BadInput."""
    base, head = sides(commits, repository)
    names = {"A": label(base, repository), "B": label(head, repository)}
    print(f"{machine.name()}; {rounds} rounds of one process per side; cases: {expression}", flush=True)
    with (
        tempfile.TemporaryDirectory(prefix="bench_commits_") as directory,
        tree(base, Path(directory) / "a", repository) as a,
        tree(head, Path(directory) / "b", repository) as b,
    ):
        share(b, a)
        check_imports(a)
        check_imports(b)
        figures = in_turn({"A": a, "B": b}, names, expression, rounds)
    return over_rounds(figures["A"]), over_rounds(figures["B"])


def in_turn(trees: dict[str, Path], names: dict[str, str], expression: str, rounds: int) -> dict[str, list[Results]]:
    """The figures of every round of both sides. Says what failed, and stops after a round with nothing to compare."""
    figures: dict[str, list[Results]] = {side: [] for side in trees}
    said: set[str] = set()
    for turn in range(rounds):
        for side in list(trees)[:: 1 if turn % 2 == 0 else -1]:
            found, failures = measure(trees[side], expression, names[side])
            figures[side].append(found)
            for failure in dict.fromkeys(failures):
                if (line := f"{side}: {failure}") not in said:
                    print(line, flush=True)
                    said.add(line)
        if turn == 0:
            empty = [side for side, found in figures.items() if not found[0].figures]
            for side in empty:
                print(f"{side}: no case was measured in {names[side]} with -k {expression!r}", flush=True)
            if empty:
                break
    return figures


def sides(commits: list[str], repository: Path) -> tuple[str, str | None]:
    """(BASE, HEAD) as hashes; a HEAD of None is the working tree."""
    has_changes = bool(git(repository, "status", "--porcelain").strip())
    head = commits[1] if len(commits) == 2 else None if has_changes else "HEAD"
    base = commits[0] if commits else "HEAD" if head is None else f"{head}~1"

    def commit(name: str) -> str:
        try:
            return git(repository, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}").strip()
        except BadInput as error:
            raise BadInput(f"compare: {name} must be a commit of {repository}, got none of that name") from error

    return commit(base), head and commit(head)


def label(commit: str | None, repository: Path) -> str:
    """A side in words."""
    if commit is None:
        return f"the working tree, with changes since {git(repository, 'log', '-1', '--format=%h %s').strip()}"
    return git(repository, "log", "-1", "--format=%h %s", commit).strip()


def git(repository: Path, *words: str) -> str:
    """What git prints. Raises BadInput with what it complains of."""
    try:
        command = ["git", "-C", str(repository), "-c", f"core.hooksPath={os.devnull}", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except subprocess.CalledProcessError as error:
        raise BadInput(f"compare: git {words[0]} must succeed, got {error.stderr.strip()}") from error
    except OSError as error:
        raise BadInput(f"compare: --commits needs git, got {error}") from error


@contextmanager
def tree(commit: str | None, path: Path, repository: Path) -> Iterator[Path]:
    """A directory with the commit's files, or with the working tree's that git does not ignore."""
    if commit is None:
        for name in git(repository, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0"):
            if name and (repository / name).is_file():
                (path / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(repository / name, path / name)
        yield path
        return
    git(repository, "worktree", "add", "--detach", "--force", str(path), commit)
    try:
        yield path
    finally:
        git(repository, "worktree", "remove", "--force", str(path))


def share(source: Path, target: Path) -> None:
    """Puts the source's benchmarks in place of the target's."""
    for name in SHARED:
        shutil.rmtree(target / name, ignore_errors=True)
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name)
        elif (source / name).is_file():
            shutil.copy2(source / name, target / name)


def environment(directory: Path) -> dict[str, str]:
    """This process's, with the directory first on Python's path and nothing of another copy of this project behind."""
    paths = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    others = [path for path in paths if not any((Path(path) / package).is_dir() for package in (*PACKAGES, "bench"))]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(directory), *others]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTEST_ADDOPTS": "",
        "COLUMNS": "200",  # pytest cuts its reasons to the terminal's
    }


def check_imports(directory: Path) -> None:
    """Raises BadInput unless the packages that the directory has are imported from it, an installed one or not."""
    code = "import importlib.util as u, sys; print(*(u.find_spec(name).origin for name in sys.argv[1:]), sep='\\n')"
    packages = [package for package in PACKAGES if (directory / package / "__init__.py").is_file()]
    done = subprocess.run(
        [sys.executable, "-c", code, *packages],
        cwd=directory,
        env=environment(directory),
        capture_output=True,
        text=True,
    )
    origins = done.stdout.splitlines()
    expected = [str(directory / package / "__init__.py") for package in packages]
    if done.returncode != 0 or [os.path.realpath(path) for path in origins] != [os.path.realpath(p) for p in expected]:
        got = ", ".join(origins) or done.stderr.strip()
        raise BadInput(f"compare: {', '.join(packages)} must be imported from {directory}, got {got}")


def measure(directory: Path, expression: str, name: str) -> tuple[Results, list[str]]:
    """One process: its figures, and a line for each case or file that failed. Raises BadInput if pytest did not run."""
    out = directory.parent / f"{directory.name}.json"
    out.unlink(missing_ok=True)
    words = [
        "-m",
        "pytest",
        "bench",
        "-q",
        "--tb=no",
        "-rfE",
        "-p",
        "no:cacheprovider",
        "-p",
        "pytest_benchmark.plugin",
    ]
    words += ["--benchmark-only", f"--benchmark-json={out}", "--continue-on-collection-errors", "-k", expression]
    try:
        done = subprocess.run(
            [sys.executable, *words],
            cwd=directory,
            env=environment(directory),
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise BadInput(
            f"compare: one round must end within {LIMIT_S} s, got none from {name}; choose fewer cases with -k"
        ) from error
    failures = [line for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    if done.returncode not in (0, 1, 5) and not failures:  # 1: some failed; 5: nothing was chosen
        got = (done.stderr.strip() or done.stdout.strip()).splitlines()[-3:]
        raise BadInput(f"compare: pytest must run in {name}, got exit code {done.returncode}: {' '.join(got)}")
    if not out.is_file() or not out.stat().st_size:
        return Results(name, {}), failures
    found = pytest_benchmark(json.loads(out.read_text(encoding="utf-8")), name)
    return Results(name, found.facts, found.figures), failures


def over_rounds(rounds: list[Results]) -> Results:
    """Medians and quartiles over the rounds, of the cases that every round has."""
    combined = Results(rounds[0].label, rounds[0].facts)
    for key in rounds[0].figures:
        figures = [one.figures[key] for one in rounds if key in one.figures]
        if len(figures) < len(rounds):
            continue
        values = [figure.value for figure in figures]
        low = high = None
        if len(values) >= LEAST_ROUNDS:
            low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        peaks = [figure.peak for figure in figures if figure.peak is not None]
        combined.figures[key] = Figure(
            statistics.median(values), "time", low, high, statistics.median(peaks) if peaks else None
        )
    return combined
