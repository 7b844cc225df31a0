"""--cuda-graphs: refused where it cannot run, and the same bits as without it."""

import pytest
import torch
from conftest import SMALL
from runs import newest, run
from safetensors.torch import load_file

from engine import config, device
from engine.errors import BadInput
from engine.run import metrics


def train(out, shards, *flags: str) -> int:
    return run(
        "train", *SMALL, "--num-steps", "2", "--eval-every", "None", "--data", str(shards), "--out", str(out), *flags
    )


@pytest.mark.parametrize("flags", [["--no-compile"], ["--parallel", "fsdp"], ["--parallel", "hsdp"]], ids=" ".join)
def test_it_is_refused_with_what_it_cannot_go_with(flags):
    with pytest.raises(
        BadInput, match=rf"--cuda-graphs must go with .*, got {' '.join(flags)}; leave one of them out$"
    ):
        config.parse(["tiny", "--optim.name", "adamw", "--cuda-graphs", *flags], "train")


@pytest.mark.parametrize("is_compiled", [True, False])
def test_it_is_refused_on_a_cpu(is_compiled):
    got = "got a cpu; leave" if is_compiled else "got a cpu without torch.compile; leave"
    with pytest.raises(BadInput, match=f"--cuda-graphs needs a GPU and torch.compile, {got} it out"):
        device.use_cuda_graphs(torch.device("cpu"), is_compiled)


def assert_equal_numbers(left, right) -> None:
    rows = [[row.get("loss") for row in metrics.read_rows(out / "metrics.jsonl")] for out in (left, right)]
    assert rows[0] == rows[1]
    for name in ("model.safetensors", "optimizer.safetensors"):
        tensors = [load_file(newest(out) / name) for out in (left, right)]
        assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])


@pytest.mark.slow
def test_gradients_are_added_outside_of_the_graphs_and_give_the_same_numbers(shards, tmp_path, monkeypatch):
    """The step's part of it, on a CPU, where nothing is recorded."""
    assert train(tmp_path / "plain", shards) == 0
    marks, kept = [], set()
    mark = torch.compiler.cudagraph_mark_step_begin
    monkeypatch.setattr(device, "use_cuda_graphs", lambda *_: None)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(mark()))
    step = torch.optim.AdamW.step

    def watched(self, *args, **options):
        kept.add(tuple(p.grad.data_ptr() for group in self.param_groups for p in group["params"]))
        return step(self, *args, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    assert train(tmp_path / "graphs", shards, "--cuda-graphs") == 0
    assert len(marks) == 2 * 2  # two updates of two micro-batches
    assert len(kept) == 1  # the same memory at each update
    assert_equal_numbers(tmp_path / "plain", tmp_path / "graphs")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("dropout", ["0.0", "0.1"])
def test_a_run_replayed_from_cuda_graphs_has_the_same_numbers(shards, tmp_path, dropout):
    flags = ["--deterministic", "--num-steps", "6", "--model.dropout", dropout]
    assert train(tmp_path / "plain", shards, *flags) == 0
    try:
        assert train(tmp_path / "graphs", shards, *flags, "--cuda-graphs") == 0
    finally:
        torch._inductor.config.triton.cudagraphs = False
        torch._dynamo.reset()
    assert_equal_numbers(tmp_path / "plain", tmp_path / "graphs")
