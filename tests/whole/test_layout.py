"""Rules of the repository that no other test checks: imports, file names and lengths, the version."""

import ast
import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGES = ("kernels", "model", "engine")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MAY_IMPORT = {"kernels": {"kernels"}, "model": {"kernels", "model"}, "engine": {"kernels", "model", "engine"}}


def imported(path: Path) -> set[str]:
    """Modules that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downhill_only(path):
    house = path.relative_to(ROOT).parts[0]
    tops = {name.split(".")[0] for name in imported(path)}
    assert tops & {*PACKAGES, "bench", "tests"} <= MAY_IMPORT[house]


def test_nothing_imports_the_loop():
    files = [*SOURCES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "bench").glob("*.py")]
    assert not [path for path in files if "engine.train" in imported(path)]


@pytest.mark.parametrize("package", PACKAGES)
def test_no_file_shadows_the_standard_library_or_a_package_in_use(package):
    # `torchrun engine/train.py` puts engine/ first on sys.path, where a profile.py would shadow Python's own.
    installed = {name for name in importlib.metadata.packages_distributions() if name not in PACKAGES}
    taken = set(sys.stdlib_module_names) | installed
    assert not {path.stem for path in (ROOT / package).glob("*.py")} & taken - {"__init__"}


def test_no_file_is_named_for_nothing_or_too_long():
    for path in SOURCES:
        assert path.stem not in {"utils", "common", "helpers", "misc"}
        assert len(path.read_text().splitlines()) <= 400, f"{path} is long: split it by idea"


def test_our_packages_are_not_shadowed_by_a_stranger_s():
    for package in PACKAGES:
        assert Path(importlib.util.find_spec(package).origin).parent == ROOT / package


@pytest.mark.parametrize(
    "module", ["engine.cli", "engine.config", "engine.tokens.prepare", "engine.tokens.batches", "model", "kernels"]
)
def test_torch_is_imported_late(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_version_is_the_changelog_s_newest():
    newest = next(line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## "))
    assert newest.removeprefix("## ").split()[0] == importlib.metadata.version("gpt2-engine")
