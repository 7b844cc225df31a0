"""Rules of the repository that no other test checks: imports, file names and sizes, the version."""

import ast
import importlib.metadata
import importlib.util
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGES = ("kernels", "model", "engine")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
BENCH, TESTS, EXAMPLES = (sorted((ROOT / folder).rglob("*.py")) for folder in ("bench", "tests", "examples"))
MAY_IMPORT = {"kernels": {"kernels"}, "model": {"kernels", "model"}, "engine": {"kernels", "model", "engine"}}

# Files and folders of engine/ in layers, lowest first. Each imports itself and lower layers only.
LAYERS = (
    {"errors", "output", "packages", "sizes", "chips", "speed"},
    {"system", "flags"},
    {"lock", "durable"},
    {"tokens"},
    {"config"},
    {"device", "rendezvous"},
    {"planning"},
    {"distributed"},
    {"evaluation", "health", "optim"},
    {"checks", "tasks"},
    {"step"},
    {"run"},
    {"tuning", "parts"},
    {"start", "comparison"},
    {"train", "commands", "rehearsal"},
    {"cli"},
)
FILES = {"train", "start", "step", "cli", "errors", "output", "lock", "evaluation", "distributed"}
FILES |= {"device", "rendezvous", "system", "packages", "flags", "sizes", "parts", "chips"}
FILES |= {"rehearsal", "durable", "speed"}
FOLDERS = {
    "tokens": {"prepare", "tokenizer", "shards", "batches", "mixture", "weights", "names", "foreign"},
    "tokens/reading": {"sources", "formats", "documents", "parts", "text", "cuts", "streams"}
    | {"records", "values", "tables", "packed", "sequential", "hub"},
    "tokens/preparation": {"options", "building", "encode", "fast", "workers", "writer", "journal", "account"}
    | {"duplicates", "tails", "estimate", "progress", "summary"},
    "tokens/inspection": {"view", "scan", "tables", "integrity"},
    "run": {"checkpoint", "saver", "resume", "settings", "branch", "directory", "export", "verify", "plots"}
    | {"metrics", "console", "progress", "header", "rows", "repair", "appender", "curves", "sinks"}
    | {"tensors", "vocabulary"},
    "checks": {"facts", "selfcheck", "compiler", "cache", "scratch", "doctor", "network"},
    "config": {"fields", "presets", "parse", "file", "toml"},
    "optim": {"groups", "muon", "schedule", "sharing"},
    "planning": {"memory", "roofline_ops", "communication", "owners", "efficiencies", "plan", "summary"},
    "tasks": {"scoring", "records", "hellaswag", "lambada", "text"},
    "commands": {
        "data",
        "training",
        "sampling",
        "evaluating",
        "weights",
        "plotting",
        "comparing",
        "machine",
        "planning",
        "viewing",
    },
    "comparison": {"records", "references", "overlay", "compare", "welch", "equal_loss", "page"},
    "tuning": {"search", "ops", "steps", "record", "tune", "choices"},
    "health": {"heartbeat", "verdict", "failures", "stopping", "replicas", "timing", "busy"},
}
LONGEST_FUNCTION, MOST_ARGUMENTS, LONGEST_FILE, LONGEST_BENCH = 60, 7, 400, 3500


def name_of(path: Path) -> str:
    """Dotted name under which a file is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> set[str]:
    """Modules that a file imports, also inside functions and for type checkers."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def graph(paths: list[Path]) -> dict[str, set[str]]:
    """Imports of each module among these files, without packages named only to reach a module."""
    modules = {name_of(path): path for path in paths}
    edges = {}
    for name, path in modules.items():
        found = imported(path) & set(modules)
        edges[name] = {one for one in found if not any(other.startswith(one + ".") for other in found)} - {name}
    return edges


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downhill_only(path):
    package = path.relative_to(ROOT).parts[0]
    tops = {name.split(".")[0] for name in imported(path)}
    assert tops & {*PACKAGES, "bench", "tests"} <= MAY_IMPORT[package]


def test_the_places_of_engine_import_lower_ones_only():
    layer_of = {place: number for number, layer in enumerate(LAYERS) for place in layer}
    assert set(layer_of) == FILES | {folder.partition("/")[0] for folder in FOLDERS}
    for path in (ROOT / "engine").rglob("*.py"):
        name = name_of(path)
        if name == "engine":
            continue
        place = name.split(".")[1]
        others = {other.split(".")[1] for other in imported(path) if other.startswith("engine.")} - {place}
        wrong = {other for other in others if other in layer_of and layer_of[other] >= layer_of[place]}
        assert not wrong, f"{name} imports {', '.join(sorted(wrong))}, which are in no lower layer"


def test_no_import_goes_in_a_circle():
    try:
        tuple(TopologicalSorter(graph([*SOURCES, *BENCH])).static_order())
    except CycleError as error:
        pytest.fail(f"imports in a circle: {' -> '.join(reversed(error.args[1]))}")


def test_a_circle_through_a_type_checker_s_import_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "one.py").write_text("def late():\n    import two\n")
    (tmp_path / "two.py").write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from one import late\n")
    with pytest.raises(CycleError):
        tuple(TopologicalSorter(graph(sorted(tmp_path.glob("*.py")))).static_order())


def test_engine_has_its_files_at_the_door_and_its_rooms():
    assert {path.stem for path in (ROOT / "engine").glob("*.py")} - {"__init__"} == FILES
    rooms = {path.parent.relative_to(ROOT / "engine").as_posix() for path in (ROOT / "engine").glob("*/**/*.py")}
    assert rooms == set(FOLDERS)
    for folder, files in FOLDERS.items():
        assert {path.stem for path in (ROOT / "engine" / folder).glob("*.py")} - {"__init__"} == files


def test_nothing_imports_the_loop():
    assert not [path for path in [*SOURCES, *BENCH, *TESTS, *EXAMPLES] if "engine.train" in imported(path)]


@pytest.mark.parametrize("package", PACKAGES)
def test_no_file_shadows_the_standard_library_or_a_package_in_use(package):
    # `torchrun engine/train.py` puts engine/ first on sys.path, where a profile.py would shadow Python's own.
    installed = {name for name in importlib.metadata.packages_distributions() if name not in PACKAGES}
    taken = set(sys.stdlib_module_names) | installed
    names = {path.stem for path in (ROOT / package).iterdir()} - {"__init__", "__pycache__", "py"}  # py.typed
    assert not names & taken


@pytest.mark.parametrize("paths", [SOURCES, BENCH, TESTS, EXAMPLES], ids=["sources", "bench", "tests", "examples"])
def test_no_file_is_named_for_nothing_or_too_long(paths):
    for path in paths:
        assert path.stem not in {"utils", "common", "helpers", "misc"}
        lines = len(path.read_text().splitlines())
        assert lines <= LONGEST_FILE, f"{path} has {lines} lines: split it by idea"


def test_no_function_of_engine_and_bench_is_long_or_takes_many_arguments():
    for path in [*(ROOT / "engine").rglob("*.py"), *BENCH]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                count = len([one for one in arguments if one.arg not in ("self", "cls")])
                lines = node.end_lineno - node.lineno + 1
                assert lines <= LONGEST_FUNCTION, f"{path}: {node.name} has {lines} lines"
                assert count <= MOST_ARGUMENTS, f"{path}: {node.name} takes {count} arguments"


def test_what_measures_the_engine_does_not_outgrow_it():
    lines = sum(len(path.read_text().splitlines()) for path in BENCH)
    assert lines <= LONGEST_BENCH, f"bench/ has {lines} lines"


def test_our_packages_are_not_shadowed_by_a_stranger_s():
    for package in PACKAGES:
        assert Path(importlib.util.find_spec(package).origin).parent == ROOT / package


@pytest.mark.parametrize(
    "module",
    [
        "engine.cli",
        "engine.config",
        "engine.planning.summary",
        "engine.tokens.prepare",
        "engine.tokens.batches",
        "model",
        "kernels",
    ],
)
def test_torch_is_imported_late(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_version_is_the_changelog_s_newest():
    newest = next(line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## "))
    assert newest.removeprefix("## ").split()[0] == importlib.metadata.version("gpt2-engine")
