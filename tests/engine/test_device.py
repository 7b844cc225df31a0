"""Devices that are not here: each decision for CUDA, ROCm, XPU, MPS and a CPU, from facts that are faked."""

import ast
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from engine import device, distributed, optim
from engine.checks import doctor, facts
from engine.config import PRESETS, OptimConfig
from engine.distributed import Ranks
from engine.errors import BadInput
from engine.health.failures import out_of_memory, out_of_memory_sentence
from engine.health.timing import Clock
from engine.step import Guard, Mailbox, Numbers, Step
from engine.tuning import tune
from kernels import dispatch
from model.gpt2 import GPT2, GPT2Config

KINDS = ("cuda", "rocm", "xpu", "mps", "cpu")
GIB = 2**30
MPS = torch.device("mps", 0)


@pytest.fixture
def machine(monkeypatch):
    """A function that fakes a machine with two devices of a kind, and returns the first."""

    def fake(kind: str) -> torch.device:
        type_ = "cuda" if kind == "rocm" else kind
        found = None if kind == "cpu" else torch.device(type_)
        gpu = SimpleNamespace(name=f"A {kind}", total_memory=64 * GIB, major=9, minor=0, has_fp64=False)
        if kind == "rocm":
            gpu.gcnArchName = "gfx90a:sramecc+:xnack-"
        for owner, name, value in [
            (torch.version, "hip", "7.0" if kind == "rocm" else None),
            (torch.accelerator, "current_accelerator", lambda check_available=False: found),
            (torch.accelerator, "device_count", lambda: 0 if found is None else 2),
            (torch.accelerator, "get_memory_info", lambda on: (48 * GIB, 64 * GIB)),
            (torch.accelerator, "memory_stats", lambda on: {"num_alloc_retries": 3}),
            (torch.accelerator, "max_memory_allocated", lambda on: 9 * GIB),
            (torch.cuda, "is_available", lambda: type_ == "cuda"),
            (torch.cuda, "get_device_capability", lambda on: (9, 0)),
            (torch.cuda, "get_device_properties", lambda on: gpu),
            (torch.cuda, "get_device_name", lambda on: gpu.name),
            (torch.xpu, "get_device_properties", lambda on: gpu),
            (torch.xpu, "get_device_name", lambda on: gpu.name),
            (torch.xpu, "is_bf16_supported", lambda: True),
            (torch.backends.mps, "get_name", lambda: gpu.name),
            (torch.backends.mps, "is_macos_or_newer", lambda major, minor: (major, minor) <= (14, 0)),
            (torch.mps, "recommended_max_memory", lambda: 48 * GIB),
            (torch.mps, "driver_allocated_memory", lambda: 8 * GIB),
        ]:
            monkeypatch.setattr(owner, name, value)
        device.widest.cache_clear()
        return torch.device("cpu") if found is None else torch.device(type_, 0)

    yield fake
    device.widest.cache_clear()


# ---- Decisions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_takes_the_accelerator_that_is_there_unless_the_cpu_is_asked_for(kind, machine, monkeypatch):
    on = machine(kind)
    assert device.current().type == on.type
    assert distributed._read_environment().device == on
    monkeypatch.setenv("GPT2_DEVICE", "cpu")
    assert distributed._read_environment().device == torch.device("cpu")
    monkeypatch.setenv("GPT2_DEVICE", "cuda")
    with pytest.raises(BadInput, match="GPT2_DEVICE must be cpu, got 'cuda'; unset it"):
        device.current()


def test_an_accelerator_that_nobody_wrote_a_path_for_is_left_alone(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("hpu"))
    assert device.current() == torch.device("cpu")


@pytest.mark.parametrize(
    ("kind", "auto", "refused"),
    [
        ("cuda", "bf16", []),
        ("rocm", "bf16", ["tf32"]),
        ("xpu", "bf16", ["tf32"]),
        ("mps", "fp32", ["tf32"]),
    ],
)
def test_each_kind_has_its_precision_and_refuses_what_it_has_not(kind, auto, refused, machine):
    on = machine(kind)
    assert device.choose_precision("auto", on)[0] == auto
    for asked in ("bf16", "fp16", "tf32", "fp32"):
        if asked in refused:
            with pytest.raises(BadInput, match=f"--precision {asked} needs an NVIDIA GPU .*; use fp32"):
                device.choose_precision(asked, on)
        else:
            assert device.choose_precision(asked, on) == (asked, "asked for")


def test_a_rocm_capability_is_not_read_as_nvidia_s(machine, monkeypatch):
    on = machine("rocm")
    monkeypatch.setattr(torch.cuda, "get_device_capability", None)  # (9, 0) is an MI100 there, and no sm_90
    assert device.choose_precision("auto", on)[0] == "bf16"
    monkeypatch.setattr(device, "HAS_TRITON", True)
    monkeypatch.setattr(device, "_build_obstacle", lambda compiler: None)
    monkeypatch.setattr(device, "has_c_compiler", lambda: True)
    assert device.wants_compile(None, on) == (True, "on")
    assert doctor._gpus()[0] == ("GPU 0", "A rocm, gfx90a, 64 GiB")


def test_an_old_macos_has_no_bf16(machine, monkeypatch):
    on = machine("mps")
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: False)
    with pytest.raises(BadInput, match="bf16 needs macOS 14 on mps"):
        device.choose_precision("bf16", on)


@pytest.mark.parametrize("kind", KINDS)
def test_only_cuda_and_rocm_compile_by_default_and_mps_never(kind, machine, monkeypatch):
    on = machine(kind)
    monkeypatch.setattr(device, "HAS_TRITON", True)
    monkeypatch.setattr(device, "has_c_compiler", lambda: True)
    monkeypatch.setattr(device, "_build_obstacle", lambda compiler: None)
    monkeypatch.setattr(device.shutil, "which", lambda name: name)
    assert device.wants_compile(None, on)[0] == (on.type == "cuda")
    assert device.wants_compile(True, on)[0] == (kind != "mps")


@pytest.mark.parametrize("kind", KINDS)
def test_triton_is_for_cuda_and_rocm_and_the_reason_names_the_device(kind, machine, monkeypatch):
    on = machine(kind)
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    monkeypatch.setattr(dispatch, "HAS_TRITON", True)
    monkeypatch.setattr(dispatch, "has_c_compiler", lambda: True)
    obstacle = dispatch.triton_obstacle("gelu", on, torch.float32, 64)
    assert (obstacle is None) == (on.type == "cuda")
    if kind in ("xpu", "mps"):
        assert obstacle == f"our kernels have not been run on {kind}"
        assert "torch: our kernels" in dispatch.select("auto", on, torch.float32, 64).summary()


@pytest.mark.parametrize("kind", KINDS)
def test_streams_are_used_where_pytorch_has_them(kind, machine):
    on = machine(kind)
    expected = {"cuda": torch.cuda.Event, "rocm": torch.cuda.Event, "xpu": torch.xpu.Event}
    assert device.events(on) is expected.get(kind)
    assert device.BACKENDS.get(on.type) == {"cuda": "nccl", "rocm": "nccl", "xpu": "xccl"}.get(kind)
    assert device.widest(on) == (torch.float32 if kind in ("mps", "xpu") else torch.float64)


@pytest.mark.parametrize("kind", ["cuda", "rocm", "xpu", "mps"])
def test_memory_and_names_are_those_of_the_device(kind, machine):
    on = machine(kind)
    assert device.name(on) == facts.device_name(on) == f"A {kind}"
    assert facts.machine(on)["driver"] != "none"
    assert device.free_bytes(on) == (40 if kind == "mps" else 48) * GIB
    assert f"A {kind}, " in device.describe(on)
    assert device.alloc_retries(on) == (None if kind == "mps" else 3)
    assert device.peak_gib(on) == (8 if kind == "mps" else 9)
    assert device.peak_flops(on, "bf16") is None  # no card of that name has a data sheet


def test_what_the_device_is_told_to_forget_is_its_own_memory(machine, monkeypatch):
    called = []
    for owner, name in [
        (torch.accelerator, "empty_cache"),
        (torch.accelerator, "synchronize"),
        (torch.mps, "empty_cache"),
    ]:
        monkeypatch.setattr(owner, name, lambda *on, said=f"{owner.__name__}.{name}": called.append(said))
    monkeypatch.setattr(torch.accelerator, "reset_peak_memory_stats", lambda on: called.append(f"peak of {on}"))
    for kind in ("cpu", "cuda", "mps"):
        on = machine(kind)
        device.forget_memory(on)
        device.synchronize(on)
    assert called == [
        *("torch.accelerator.empty_cache", "peak of cuda:0", "torch.accelerator.synchronize"),
        *("torch.mps.empty_cache", "torch.accelerator.synchronize"),
    ]


# ---- Refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cuda", "rocm", "xpu", "mps"])
def test_several_processes_are_for_devices_with_collectives(kind, machine, monkeypatch):
    machine(kind)
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "29500")
    if kind == "mps":
        with pytest.raises(BadInput, match=r"got 2 on mps, .* GPT2_DEVICE=cpu in front of the command"):
            distributed._read_environment()
        return
    assert distributed._read_environment().device.index == 1
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    with pytest.raises(BadInput, match="got 1 GPUs for local rank 1"):
        distributed._read_environment()


def test_what_mps_cannot_do_is_refused_before_the_data_are_read():
    config = PRESETS["tiny"]
    dropout = dataclasses.replace(config, recompute="block", model=dataclasses.replace(config.model, dropout=0.1))
    device.check_can_train(config, MPS)
    for one, text in (
        (
            dataclasses.replace(config, parallel="fsdp"),
            "--parallel fsdp needs collectives, which PyTorch cannot do on mps",
        ),
        (dropout, "--recompute block with dropout must draw the same numbers twice, which"),
    ):
        device.check_can_train(one, torch.device("cuda"))
        with pytest.raises(BadInput, match=text):
            device.check_can_train(one, MPS)


def test_mps_has_no_cuda_graphs_and_no_tuning(machine, tmp_path):
    machine("mps")
    with pytest.raises(BadInput, match=r"--cuda-graphs needs a GPU and torch\.compile, got a mps"):
        device.use_cuda_graphs(MPS, is_compiled=False)
    with pytest.raises(BadInput, match="tune: the device must be a CPU or a GPU of CUDA or ROCm, got mps"):
        tune.tune("tiny", PRESETS["tiny"], 1.0, str(tmp_path / "tuning.json"))


@pytest.mark.parametrize(
    ("message", "request_"),
    [
        ("MPS backend out of memory (MPS allocated: 17.9 GB). Tried to allocate 2.00 GB on private pool.", "2.00 GB"),
        ("HIP error: out of memory", None),
        ("HIPBLAS_STATUS_ALLOC_FAILED when calling hipblasCreate(handle)", None),
    ],
    ids=["mps", "rocm", "hipblas"],
)
def test_each_kind_s_out_of_memory_is_known(message, request_, machine):
    on = machine("mps")
    assert out_of_memory(RuntimeError(message))
    sentence = out_of_memory_sentence(RuntimeError(message), PRESETS["gpt2"], 4, Ranks(0, 0, 1, on))
    assert (f"asking for {request_} more" in sentence) == (request_ is not None)
    assert "one step must fit into the memory of this machine's A mps, " in sentence
    assert "fsdp" not in sentence


# ---- A step without float64, events and a heeded verdict ----------------------------------------------------------


@pytest.fixture
def like_mps(monkeypatch):
    """A CPU that has what MPS has: no float64 on the device, and a fused AdamW that ignores found_inf."""
    monkeypatch.setattr(device, "widest", lambda on: torch.float32)
    monkeypatch.setattr(device, "heeds_found_inf", lambda on: False)


class Deaf(torch.optim.AdamW):
    """AdamW that ignores found_inf, as the fused one of MPS."""

    def step(self, closure=None):
        self.found_inf = None
        return super().step(closure)


def updates(poisoned: int | None = None) -> tuple[list[Numbers], dict, Guard]:
    """Numbers of five updates of a small model, its weights, and the guard. poisoned: the update of a NaN loss."""
    torch.manual_seed(0)
    model = GPT2(GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=8, vocab_size=32))
    on, numbers, mailbox = torch.device("cpu"), [], Mailbox()
    optimizer, guard = optim.build(model, OptimConfig(lr=1e-2)), Guard(on)
    if poisoned is not None:
        optimizer.__class__ = Deaf
    update = Step(
        model, optimizer, torch.amp.GradScaler("cpu", enabled=False), guard, 1, 1.0, Ranks(0, 0, 1, on), Clock(on)
    )
    tokens = torch.randint(32, (4, 9))
    for step in range(5):
        before = model.wte.weight.detach().clone()
        if step == poisoned:
            model.wpe.weight.data[0, 0] = float("nan")
        mailbox.exchange(update(step, [(tokens[:, :-1], tokens[:, 1:])], 1e-2))
        numbers.append(mailbox.collect())
        if step == poisoned:
            assert torch.equal(before, model.wte.weight), "the update was made"
            model.wpe.weight.data[0, 0] = 0.0
    return numbers, model.state_dict(), guard


@pytest.mark.usefixtures("like_mps")
def test_a_verdict_that_fused_adamw_ignores_still_leaves_the_weights_alone():
    numbers, weights, guard = updates(poisoned=2)
    assert [row.skipped for row in numbers] == [0, 0, 1, 1, 1]
    assert guard.state.dtype == torch.float32
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_numbers_in_float32_are_those_in_float64(request):
    wide, weights, _ = updates()
    request.getfixturevalue("like_mps")
    narrow, same, _ = updates()
    assert wide == narrow  # the loss and the norm are float32 in any case
    assert all(torch.equal(weights[name], same[name]) for name in weights)


# ---- Sources ------------------------------------------------------------------------------------------------------

TRITON = "our Triton kernels run on CUDA and ROCm only"
CUDA_IN = {
    "engine/device.py": "the module that knows kinds of devices",
    "engine/checks/doctor.py": "NCCL and its version, where PyTorch has it",
    "engine/planning/memory.py": "a model of what a CPU and what CUDA keep",
    "engine/tokens/batches.py": "page-locked memory, below engine/device.py in the order of imports",
    "engine/tuning/choices.py": "--micro-batch-size auto tries its size where the memory model was measured",
    "engine/tuning/tune.py": "gpt2 tune is for a CPU and for CUDA and ROCm: shares of its time",
    "model/cache.py": "a decode step is recorded as a CUDA graph",
    "model/generate.py": "a decode step is recorded as a CUDA graph",
    "kernels/dispatch.py": TRITON,
    "kernels/launch.py": TRITON,
    "kernels/tiles.py": TRITON,
    "kernels/aot.py": TRITON,
    "kernels/cross_entropy.py": "a product in bfloat16 with a float32 result, which PyTorch has on CUDA and ROCm only",
}
EXACT = "a definition in float64, which the ops of CUDA and of a CPU are held against"
FLOAT64_IN = {
    "engine/device.py": "the module that knows which device has it",
    "engine/run/tensors.py": "the names of types in a file",
    "engine/tuning/ops.py": EXACT,
    "kernels/accuracy.py": EXACT,
    "kernels/cases.py": EXACT,
    "kernels/launch.py": "the types that an op takes",
}


def names_cuda(node: ast.AST) -> bool:
    """Whether this is torch.cuda, the type "cuda" or .is_cuda."""
    if isinstance(node, ast.Attribute):
        return node.attr == "is_cuda" or ast.unparse(node) == "torch.cuda"
    return isinstance(node, ast.Constant) and node.value == "cuda"


def names_float64(node: ast.AST) -> bool:
    """Whether this is torch.float64, torch.double or .double."""
    return isinstance(node, ast.Attribute) and node.attr in ("float64", "double")


@pytest.mark.parametrize(
    ("finds", "allowed"), [(names_cuda, CUDA_IN), (names_float64, FLOAT64_IN)], ids=["cuda", "float64"]
)
def test_no_other_file_assumes_a_kind_of_device(finds, allowed):
    files = [path for package in ("engine", "kernels", "model") for path in (ROOT / package).rglob("*.py")]
    found = {str(path.relative_to(ROOT)) for path in files if any(map(finds, ast.walk(ast.parse(path.read_text()))))}
    assert found == set(allowed)
