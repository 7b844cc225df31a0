"""TensorBoard and W&B: a failure of either costs a run one line of output and nothing else."""

import dataclasses
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from engine.config import PRESETS
from engine.run.metrics import Metrics, read_rows

NAMES = ("tensorboard", "wandb")


class Service:
    """Fakes both packages, as far as they are used. `fails` names the calls that raise."""

    def __init__(self, monkeypatch):
        self.fails, self.error, self.calls, self.first_step = set(), RuntimeError("out of order\nfor now"), [], 0
        tensorboard, wandb = ModuleType("torch.utils.tensorboard"), ModuleType("wandb")
        tensorboard.SummaryWriter = self.open_tensorboard
        wandb.init, wandb.Settings = self.open_wandb, dict
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
        monkeypatch.setitem(sys.modules, "wandb", wandb)

    def call(self, what: str, *args) -> None:
        self.calls.append((what, *args))
        if what in self.fails:
            raise self.error

    def open_tensorboard(self, directory, purge_step):
        self.call("tensorboard open", directory, purge_step)
        return SimpleNamespace(
            add_scalar=lambda name, value, step: self.call("tensorboard write", name, value, step),
            close=lambda: self.call("tensorboard close"),
        )

    def open_wandb(self, **options):
        self.call("wandb open", options)
        return SimpleNamespace(
            step=self.first_step,
            offline=False,
            url="https://example.org/run",
            log=lambda row, step: self.call("wandb write", row, step),
            finish=lambda exit_code: self.call("wandb close", exit_code),
        )

    def of(self, what: str) -> list[tuple]:
        """Arguments of every call of this kind."""
        return [tuple(args) for name, *args in self.calls if name == what]


@pytest.fixture
def service(monkeypatch) -> Service:
    return Service(monkeypatch)


@pytest.fixture
def config(tmp_path):
    return dataclasses.replace(PRESETS["tiny"], out=str(tmp_path / "a run"), num_steps=10, tokens_per_step=8)


def record(config, asked=NAMES, start: int = 0) -> None:
    """Records steps `start` to 2 of a run with these sinks."""
    Path(config.out).mkdir(exist_ok=True)
    run = Metrics(dataclasses.replace(config, **dict.fromkeys(asked, True)), start, True, "byte")
    try:
        for step in range(start, 3):
            run.log(step, loss=5.0 - step)
            run.end_step(step)
    finally:
        run.close()


def steps(config) -> list[int]:
    return [row["step"] for row in read_rows(Path(config.out) / "metrics.jsonl")]


def test_both_get_every_row_under_its_step(service, config, capsys):
    record(config)
    assert service.of("tensorboard write") == [("loss", 5.0 - step, step) for step in range(3)]
    assert service.of("wandb write") == [({"tokens": 8 * step, "loss": 5.0 - step}, step) for step in range(3)]
    assert service.of("tensorboard close") == [()]
    assert service.of("wandb close") == [(0,)]
    assert capsys.readouterr().out.count("wandb: https://example.org/run\n") == 1


def test_none_is_opened_unless_asked_for(service, config):
    record(config, asked=())
    assert service.calls == []
    assert steps(config) == [0, 1, 2]


@pytest.mark.parametrize("moment", ["open", "write", "close"])
@pytest.mark.parametrize("name", NAMES)
def test_a_failure_is_one_line_and_costs_neither_the_run_nor_the_other(service, config, capsys, name, moment):
    service.fails, before = {f"{name} {moment}", f"{name} close"}, threading.excepthook
    record(config)
    assert threading.excepthook is before
    captured = capsys.readouterr()
    assert captured.out.count(f"{name}: out of order for now; going on without it\n") == 1
    assert captured.out.count("going on without it") == 1
    assert "Traceback" not in captured.out + captured.err
    assert steps(config) == [0, 1, 2]
    (other,) = set(NAMES) - {name}
    assert len(service.of(f"{other} write")) == 3
    assert len(service.of(f"{other} close")) == 1
    assert len(service.of(f"{name} write")) == {"open": 0, "write": 1, "close": 3}[moment]
    assert len(service.of(f"{name} close")) == (0 if moment == "open" else 1)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyError(), ValueError("x" * 9999)], ids=repr
)
def test_any_error_has_a_reason_of_one_short_line(service, config, capsys, error):
    service.fails, service.error = {"tensorboard write"}, error
    record(config)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "going on without it" in line]
    assert 20 < len(line.removesuffix("; going on without it").removeprefix("tensorboard: ")) + 20 <= 320
    assert steps(config) == [0, 1, 2]


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_package_that_is_absent_is_one_line_with_the_way_to_get_it(
    service, config, monkeypatch, capsys, name, module
):
    monkeypatch.setitem(sys.modules, module, None)
    record(config)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "going on without it" in line]
    assert line.startswith(f"{name}: ")
    assert line.endswith(f"(pip install {name}); going on without it")
    assert steps(config) == [0, 1, 2]


def test_an_interrupt_is_not_taken_for_a_failure(service, config):
    service.fails, service.error = {"wandb write"}, KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        record(config)
    assert service.of("wandb close") == [(1,)]  # tells W&B that the run failed


# ---- W&B ----------------------------------------------------------------------------------------------------------


def test_wandb_is_given_project_name_directory_and_config(service, config):
    record(config)
    ((options,),) = service.of("wandb open")
    assert (options["project"], options["name"], options["resume"]) == ("gpt2", "a run", "allow")
    assert options["dir"] == config.out
    assert options["config"]["optim"]["lr"] == config.optim.lr
    assert options["config"]["num_steps"] == 10


def test_a_run_that_goes_on_is_the_same_run_there_and_a_fresh_one_another(service, config, tmp_path):
    record(config)
    service.first_step = 3  # W&B's next step after a run that ended at step 2
    record(config, start=1)
    Path(config.out).rename(tmp_path / "set aside")
    record(config)
    first, second, third = (options["id"] for (options,) in service.of("wandb open"))
    assert first == second != third
    assert len(service.of("wandb write")) == 3  # W&B takes no step twice and warns of each


# ---- The packages themselves --------------------------------------------------------------------------------------


def test_tensorboard_itself_holds_the_values_and_purges_what_is_made_again(config):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    record(config, asked=["tensorboard"])
    record(config, asked=["tensorboard"], start=2)
    events = EventAccumulator(str(Path(config.out) / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(0, 5.0), (1, 4.0), (2, 3.0)]


def test_tensorboard_s_own_thread_may_fail_without_a_traceback(config, monkeypatch, capfd):
    pytest.importorskip("tensorboard")
    from tensorboard.summary.writer import record_writer

    def fail(self, data):
        raise OSError(28, "No space left on device")

    heard = []
    monkeypatch.setattr(threading, "excepthook", heard.append)
    before = threading.excepthook
    monkeypatch.setattr(record_writer.RecordWriter, "write", fail)
    record(config, asked=["tensorboard"])
    captured = capfd.readouterr()
    assert captured.out.count("tensorboard: [Errno 28] No space left on device; going on without it") == 1
    assert heard == []
    assert steps(config) == [0, 1, 2]
    assert threading.excepthook == before


def test_another_thread_s_traceback_is_shown_while_tensorboard_is_open(config, capfd):
    pytest.importorskip("tensorboard")
    Path(config.out).mkdir()
    run = Metrics(dataclasses.replace(config, tensorboard=True), 0, True, "byte")
    thread = threading.Thread(target=lambda: [][1])
    heard = []
    run._sinks._open["tensorboard"]._excepthook = heard.append  # pytest's own
    thread.start()
    thread.join()
    run.close()
    assert [error.exc_type for error in heard] == [IndexError]


@pytest.fixture
def wandb():
    """The real package, without state of earlier runs."""
    package = pytest.importorskip("wandb")
    package.teardown()
    yield package
    package.teardown()


def test_wandb_itself_works_offline(wandb, config, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    record(config, asked=["wandb"])
    assert "wandb: offline; to send it later: wandb sync " in capsys.readouterr().out
    assert len(list((Path(config.out) / "wandb").glob("offline-run-*/*.wandb"))) == 1
    assert steps(config) == [0, 1, 2]


def test_wandb_itself_without_a_key_is_one_line(wandb, config, monkeypatch, capsys):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", config.out)  # no key in ~/.netrc either
    monkeypatch.setenv("NETRC", str(Path(config.out) / "none"))
    record(config, asked=["wandb"])
    assert capsys.readouterr().out.count("going on without it") == 1
    assert steps(config) == [0, 1, 2]
