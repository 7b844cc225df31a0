"""engine.run_training: a run from a program, in any thread, that leaves the process as it was."""

import signal
import threading
import weakref

import pytest
import torch
import torch.distributed as dist
from conftest import SMALL
from runs import assert_same_run

import engine
from engine import config as configs
from engine import start
from engine.config import TrainConfig
from engine.errors import BadInput
from engine.health.stopping import SIGNALS
from engine.step import Step


def config(shards, out, *flags: str) -> TrainConfig:
    return configs.parse([*SMALL, "--data", str(shards), "--out", str(out), "--num-steps", "2", *flags], "gpt2 train")


def in_a_thread(*args: object) -> str | None:
    """Result of run_training in another thread than the main one."""
    results = []
    thread = threading.Thread(target=lambda: results.append(engine.run_training(*args)))
    thread.start()
    thread.join()
    return results[0]


def test_a_thread_trains_twice_as_the_command_does_and_leaves_the_process_as_it_was(
    trained, shards, tmp_path, monkeypatch
):
    models, build, earlier = [], start.build, threading.enumerate()  # another test's compiler keeps some

    def noted(*args):
        run = build(*args)
        models.append(weakref.ref(run.raw_model))
        return run

    monkeypatch.setattr(start, "build", noted)

    def mine(*_):
        raise AssertionError("nobody sends a signal")

    before = {number: signal.signal(number, mine) for number in SIGNALS}
    products, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    try:
        torch.set_float32_matmul_precision("medium")
        expected = torch.manual_seed(5).get_state()
        for out in (tmp_path / "one", tmp_path / "two"):
            assert in_a_thread(config(shards, out)) is None
            assert_same_run(out, trained)
        assert torch.equal(torch.get_rng_state(), expected)
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.get_num_threads() == threads
        assert {signal.getsignal(number) for number in SIGNALS} == {mine}
        assert not [thread for thread in threading.enumerate() if not thread.daemon and thread not in earlier]
        assert [model() for model in models] == [None, None]
    finally:
        torch.set_float32_matmul_precision(products)
        for number, handler in before.items():
            signal.signal(number, handler)


def test_the_event_stops_the_run_saved_and_the_same_call_goes_on_to_the_bit(
    trained, shards, tmp_path, monkeypatch, capfd
):
    out, stop, update = tmp_path / "run", threading.Event(), Step.__call__
    with monkeypatch.context() as patch:
        patch.setattr(Step, "__call__", lambda *args: (update(*args), stop.set())[0])  # asked for in the first update
        assert in_a_thread(config(shards, out), stop) == "its caller"
    assert "stopped at step 1 of 2 by its caller: saved" in capfd.readouterr().out
    with torch.inference_mode():  # the caller's, for its own work
        assert engine.run_training(config(shards, out)) is None
        assert torch.is_inference_mode_enabled()
    assert_same_run(out, trained)


def test_what_cannot_be_trained_is_bad_input(shards, tmp_path, monkeypatch):
    good = config(shards, tmp_path / "run")
    with pytest.raises(BadInput, match=r"^train: --num-steps must be at least 1, got 0$"):
        engine.run_training(config=TrainConfig(num_steps=0))
    with pytest.raises(BadInput, match=r"data: must be a directory of token shards, got .*nowhere"):
        engine.run_training(config(tmp_path / "nowhere", tmp_path / "run"))
    with engine._training, pytest.raises(BadInput, match="one run at a time"):
        engine.run_training(good)
    dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(BadInput, match="must begin without a process group"):
            engine.run_training(good)
        assert dist.is_initialized(), "the caller's group is the caller's"
    finally:
        dist.destroy_process_group()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match="must have one process, got WORLD_SIZE=2"):
        engine.run_training(good)
    assert not (tmp_path / "run").exists()
    assert not engine._training.locked(), "a refused call must not keep others from training"
