"""Compiled code kept with a run: a restart loads it, and whatever is wrong with it only costs the time to compile."""

import hashlib
import hmac
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SMALL
from runs import ENVIRONMENT
from torch._dynamo.utils import counters
from torch.compiler._cache import CacheArtifactManager

from engine.checks import cache, facts
from engine.checks.cache import CompileCache

ABOUT = {"model": "small", "precision": "fp32"}


def product(x):
    return x @ x.T  # Inductor calls PyTorch's matrix product and needs no C++ compiler


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """Gives Inductor an empty cache, as on another machine, and forgets what was compiled."""

    def start_anew(name: str) -> None:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / name))
        torch.compiler.reset()
        CacheArtifactManager.clear()
        counters.clear()

    start_anew("first")
    yield start_anew
    torch.compiler.reset()


def compiled() -> dict[str, int]:
    """Compiles and runs the product; the counts of Inductor's cache."""
    x = torch.ones(4, 3)
    assert torch.equal(torch.compile(product, dynamic=False)(x), product(x))
    return {name: count for name, count in counters["inductor"].items() if "fxgraph_cache" in name}


@pytest.fixture
def kept(fresh, tmp_path) -> CompileCache:
    """The cache of a run that compiled the product, and then an empty machine."""
    compiled()
    kept = CompileCache(tmp_path, ABOUT, 0, pytest.fail)
    kept.save()
    fresh("second")
    return kept


def test_what_is_kept_is_compiled_no_more(kept, fresh):
    assert kept.load()
    assert compiled() == {"fxgraph_cache_hit": 1}
    fresh("third")
    assert compiled() == {"fxgraph_cache_miss": 1}


def damaged(data: bytes, how: str) -> bytes:
    archive = b"no archive"
    return {
        "a bit": data[:200] + bytes([data[200] ^ 1]) + data[201:],
        "an end": data[:-20],
        "nothing": b"",
        "another digest": b"0" * 64 + data[64:],
        "no archive": hmac.new(facts.secret(), archive, hashlib.sha256).hexdigest().encode() + archive,
        "another user's": hmac.new(b"another key", data[64:], hashlib.sha256).hexdigest().encode() + data[64:],
    }[how]


@pytest.mark.parametrize("how", ["a bit", "an end", "nothing", "another digest", "no archive", "another user's"])
def test_a_damaged_file_is_ignored_with_a_sentence(kept, how):
    kept.path.write_bytes(damaged(kept.path.read_bytes(), how))
    said = []
    kept.warn = said.append
    assert not kept.load()
    why = (
        "BadZipFile: File is not a zip file" if how == "no archive" else "it is damaged, or another user's or machine's"
    )
    assert said == [f"train: compiled code in {kept.path} is ignored, {why}; it is compiled again"]
    assert compiled() == {"fxgraph_cache_miss": 1}
    kept.save()
    kept.warn = pytest.fail
    assert kept.load()


def test_a_file_that_cannot_be_read_or_written_is_a_sentence(tmp_path, fresh):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / cache.FOLDER).touch()
    said = []
    broken = CompileCache(tmp_path / "run", ABOUT, 0, said.append)
    assert not broken.load()
    compiled()
    broken.save()
    assert [line.partition(" is")[0] for line in said] == [
        f"train: compiled code in {broken.path}",
        "train: compiled code",
    ]


def test_other_facts_and_other_ranks_have_other_files(kept, tmp_path):
    assert not CompileCache(tmp_path, ABOUT | {"precision": "bf16"}, 0, pytest.fail).load()
    assert not CompileCache(tmp_path, ABOUT, 1, pytest.fail).load()
    assert CompileCache(tmp_path, ABOUT, 0, pytest.fail).load()


def test_a_rank_keeps_its_newest_alone(kept, tmp_path):
    compiled()
    newer, other = (CompileCache(tmp_path, {"model": "larger"}, rank, pytest.fail) for rank in (0, 1))
    other.save()
    newer.save()
    assert {path.name for path in kept.folder.iterdir()} == {newer.path.name, other.path.name}


def test_a_host_that_does_not_see_out_keeps_nothing(fresh, tmp_path):
    compiled()
    CompileCache(tmp_path / "elsewhere", ABOUT, 0, pytest.fail).save()
    assert not (tmp_path / "elsewhere").exists()


def test_libraries_travel_and_never_replace_one_that_is_there(fresh, tmp_path, monkeypatch):
    library = tmp_path / "first" / "ab" / "cab.so"
    library.parent.mkdir(parents=True)
    library.write_bytes(b"code")
    monkeypatch.setattr(cache, "_loaded_libraries", lambda: [library])
    compiled()
    kept = CompileCache(tmp_path, ABOUT, 0, pytest.fail)
    kept.save()
    fresh("second")
    assert kept.load()
    assert (tmp_path / "second" / "ab" / "cab.so").read_bytes() == b"code"
    library.write_bytes(b"in use")
    fresh("first")
    assert kept.load()
    assert library.read_bytes() == b"in use"


def test_the_key_is_of_machine_versions_and_code(monkeypatch):
    about = facts.machine(torch.device("cpu"))
    assert about["torch"] == torch.__version__.partition("+")[0] or about["torch"] == torch.__version__
    assert len(about["device"]) > 3
    assert facts.code("kernels/*.py") != facts.code("kernels/*.py", "model/*.py")
    assert facts.key({"a": 1, "b": 2}) == facts.key({"b": 2, "a": 1}) != facts.key({"a": 1, "b": 3})


@pytest.mark.slow
def test_a_restarted_run_loads_what_the_first_one_compiled(shards, tmp_path):
    said = []
    for start_ in ("cold", "warm"):
        command = [sys.executable, "-m", "engine.train", *SMALL, "--compile", "--data", str(shards)]
        command += ["--out", str(tmp_path / "run"), "--eval-every", "None", "--num-steps", str(1 + len(said))]
        environment = ENVIRONMENT | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / start_)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said += [line for line in done.stdout.splitlines() if line.startswith("compile: checked")]
    assert ["(compiled in" in said[0], "(loaded from --out in" in said[1]] == [True, True]
    libraries = {path.name for path in (tmp_path / "cold").rglob("*.main.so")}
    assert len(libraries) > 5
    assert {path.name for path in (tmp_path / "warm").rglob("*.main.so")} <= libraries
