"""Fixtures that several files share: a corpus of bytes, and a model that trains on it in a second."""

import os
import tempfile
from pathlib import Path

os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="gpt2_tests_")  # no test reads or leaves what runs remember
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors are small: threads cost more than they save

import pytest
import torch

if not torch.cuda.is_available():  # before any kernel is decorated, so that Triton interprets it
    os.environ.setdefault("TRITON_INTERPRET", "1")

from engine import cli
from engine.tokens.prepare import PrepareConfig, prepare

pytest.register_assert_rewrite("runs", "hugging_face", "cross_entropy_cases")  # a failed assert there shows its values

for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):
    os.environ.pop(name, None)  # else a pytest that a test starts would act as a worker of this one

ROOT = Path(__file__).resolve().parent.parent

# Two layers of width 64, context 32; two micro-batches of four sequences per step.
SMALL = [
    "tiny",
    *("--model.n-layer", "2", "--model.n-embd", "64", "--model.n-head", "2", "--model.n-positions", "32"),
    *("--tokens-per-step", "256", "--micro-batch-size", "4", "--optim.warmup-tokens", "512", "--optim.lr", "2e-3"),
    *("--optim.name", "adamw"),
    *("--eval-tokens", "512", "--sample-tokens", "8", "--precision", "fp32", "--log-every", "1"),
]


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """Token shards of this project's sources; tokens are bytes."""
    out = tmp_path_factory.mktemp("shards") / "own"
    sources = [str(ROOT / name) for name in ("engine", "model", "kernels")]
    prepare(sources, PrepareConfig(out=str(out), tokenizer="bytes", workers=1, val_fraction=0.2))
    return out


@pytest.fixture(scope="session")
def trained(shards, tmp_path_factory) -> Path:
    """A run of two steps. Tests share it and must not change it."""
    out = tmp_path_factory.mktemp("runs") / "small"
    with pytest.raises(SystemExit) as done:
        cli.main(["train", *SMALL, "--data", str(shards), "--out", str(out), "--num-steps", "2"])
    assert done.value.code == 0
    return out


# The slowest files run first, so that no worker is left with one of them at the end.
FIRST = ["compiled_kernels", "two_hosts", "faults", "aot", "sharded", "parallel", "kernel_model", "gpu", "bare_machine"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the slowest files first. Skips bfloat16 in Triton's interpreter, which computes it wrongly."""
    order = {f"test_{name}": place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
    skip = pytest.mark.skip(reason="Triton's interpreter computes bfloat16 wrongly; runs where CUDA is")
    for item in items:
        labels = item.callspec.id.split("-") if hasattr(item, "callspec") else []
        if not torch.cuda.is_available() and "triton" in labels and "bf16" in labels:
            item.add_marker(skip)
