"""`gpt2 doctor`: a row per op with the reason, and facts of which none is lost because another is not known."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from engine import cli, packages
from engine.checks import doctor as report
from engine.tokens import tokenizer
from kernels.dispatch import MODULES


def doctor(capsys, *args: str) -> tuple[int, str, str]:
    """Runs `gpt2 doctor`; returns exit code, stdout and stderr."""
    code = cli.main(["doctor", *args])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_prints_the_machine_and_a_row_for_every_op(capsys):
    code, out, _ = doctor(capsys, "--precision", "fp32")
    assert code == 0
    rows = {line.split()[0]: line for line in out.splitlines() if line}
    assert {"python", "torch", "triton", "processor", "precision", "disk", *MODULES} <= set(rows)
    assert all("torch: " in rows[op] or "triton: " in rows[op] for op in MODULES)
    assert "ops at head_dim 64, fp32" in out


def test_heads_too_narrow_for_triton_are_named(capsys):
    _, out, _ = doctor(capsys, "--head-dim", "12", "--precision", "fp32")  # in the interpreter, or on a GPU
    assert "attention             torch: head_dim 12 < 16" in out
    assert out.count("head_dim 12 < 16") == 1


def test_the_presets_heads_are_judged_unless_a_width_is_given(capsys):
    assert "ops at head_dim 32, fp32" in doctor(capsys, "--preset", "tiny", "--precision", "fp32")[1]
    assert "ops at head_dim 80, fp32" in doctor(capsys, "--head-dim", "80", "--precision", "fp32")[1]


REFUSED = [
    (["--preset", "gpt-2"], "--preset must be a preset, got 'gpt-2'; did you mean \"gpt2\"?"),
    (["--precision", "b16"], "--precision must be one of auto, bf16, fp16, tf32, fp32, got 'b16'"),
    (["--head-dim", "0"], "--head-dim must be at least 1, got 0"),
]


@pytest.mark.parametrize(("args", "sentence"), REFUSED, ids=lambda value: "" if isinstance(value, str) else value[0])
def test_bad_input_is_a_sentence_and_exit_code_2(capsys, args, sentence):
    code, out, err = doctor(capsys, *args)
    assert (code, out, err.strip()) == (2, "", f"doctor: {sentence}")


def test_gpus_are_named_with_architecture_and_memory(monkeypatch):
    gpu = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=140 * 2**30)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    assert report._gpus() == [("GPU 0", "NVIDIA H200, sm_90, 140 GiB")]


# ---- Facts --------------------------------------------------------------------------------------------------------


def facts_of(capsys, *args: str) -> dict:
    code, out, err = doctor(capsys, "--precision", "fp32", "--json", *args)
    assert (code, err) == (0, "")
    return json.loads(out)


def test_json_and_text_say_the_same_facts(capsys, tmp_path):
    found = facts_of(capsys, "--out", str(tmp_path / "new" / "run"))
    text = doctor(capsys, "--precision", "fp32", "--out", str(tmp_path / "new" / "run"))[1]
    assert found["python"]["version"] in text
    assert found["torch"] == torch.__version__
    assert {each["name"] for each in found["caches"]} == {"gpt2-engine", "Triton", "Inductor", "temporary"}
    assert all(f"{each['name']}: {each['path']}" in text for each in found["caches"])
    assert found["disks"][0]["path"] == "."
    assert str(tmp_path / "new" / "run") in [each["path"] for each in found["disks"]]
    assert "GB free here\n" in text
    assert f"GB free for --out {tmp_path / 'new' / 'run'}" in text
    assert found["tokenizer"] == {"sha256": tokenizer.VOCABULARY_SHA256, "is_released": True}
    assert found["packages"] == {"path": str(ROOT), "hidden": []}
    assert [each["op"] for each in found["ops"]] == list(MODULES)
    assert found["head_dim"] == 64
    assert not (tmp_path / "new").exists()  # nothing is written


def test_a_narrow_terminal_folds_long_facts_behind_their_label():
    fact = report.Fact("Gloo", "lo, since this host's name leads to no address here " * 3, "gloo", None)
    ops = SimpleNamespace(explain=lambda: "gelu                  torch: " + "why " * 30)
    lines = report.Report([fact], 64, "fp32", ops, None).text(80).splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) == 8
    assert all(line.startswith((" " * 22, "Gloo ", "gelu ", "ops ")) for line in lines if line)


def broken(*_, **__):
    raise PermissionError(13, "Permission denied")


def test_a_fact_that_cannot_be_found_out_says_so_and_no_other_is_lost(capsys, monkeypatch):
    def no_driver(*_):
        raise AttributeError("module 'torch._C' has no attribute '_cuda_getDeviceCount'")

    monkeypatch.setattr(report, "_gpus", no_driver)
    monkeypatch.setattr(report.network, "interfaces", broken)
    monkeypatch.setattr(report, "read", broken)
    monkeypatch.setattr(report, "cpu_memory_bytes", broken)
    monkeypatch.setattr(report.shutil, "disk_usage", broken)
    monkeypatch.setattr(report.packages, "strangers", broken)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)  # a test before may have compiled
    monkeypatch.setattr(report.scratch, "inductor_folder", broken)
    code, out, _ = doctor(capsys, "--precision", "fp32")
    assert code == 0
    rows = {line[:22].strip(): line[22:] for line in out.splitlines()}
    for label in ("processor", "disk", "network", "Gloo", "tokenizer", "packages"):
        assert rows[label] == "unknown: PermissionError: [Errno 13] Permission denied"
    assert rows["GPU"].startswith("unknown: AttributeError: module 'torch._C'")
    assert rows["cache"] == "temporary: no directory that can be written"
    assert rows["precision"].startswith("fp32")
    assert facts_of(capsys)["tokenizer"] is None


def test_a_damaged_vocabulary_is_named(capsys, monkeypatch, tmp_path):
    (tmp_path / "vocabulary").write_bytes(tokenizer.VOCABULARY.read_bytes()[:-1])
    monkeypatch.setattr(tokenizer, "VOCABULARY", tmp_path / "vocabulary")
    assert facts_of(capsys)["tokenizer"]["is_released"] is False
    assert "not GPT-2's as released: install the package again" in doctor(capsys, "--precision", "fp32")[1]


def test_packages_of_our_names_that_ours_hide_are_named(tmp_path, monkeypatch):
    (tmp_path / "site" / "kernels").mkdir(parents=True)
    (tmp_path / "site" / "kernels" / "__init__.py").write_text("raise ImportError('not to be imported')")
    (tmp_path / "model.py").write_text("")
    (tmp_path / "empty" / "kernels").mkdir(parents=True)  # a folder that hides nothing
    for path in (tmp_path, tmp_path / "site", tmp_path / "empty"):
        monkeypatch.syspath_prepend(str(path))
    assert packages.strangers() == [tmp_path / "site" / "kernels", tmp_path / "model.py"]
    assert packages.shadowed() is None


def test_caches_have_a_size_and_one_that_is_too_large_has_a_least_one(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    for number in range(5):
        (tmp_path / f"{number}").write_bytes(bytes(1024))
    (tmp_path / "gone").symlink_to("nowhere")
    inductor = {fact.value["name"]: fact for fact in report._caches()}["Inductor"]
    assert inductor.text.startswith(f"Inductor: {tmp_path}, 5.0 KiB")
    monkeypatch.setattr(report, "MOST_FILES", 3)
    inductor = {fact.value["name"]: fact for fact in report._caches()}["Inductor"]
    assert f"Inductor: {tmp_path}, at least 3." in inductor.text or "at least 2.0" in inductor.text
    monkeypatch.setattr(report.os, "access", lambda *_: False)
    assert all(fact.text.endswith(", which cannot be written") for fact in report._caches())


def test_the_two_compilers_are_told_apart(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    for name in ("gcc", "g++"):
        (tmp_path / name).touch(0o755)
    assert [report._c_compiler()[0].value, report._cxx_compiler()[0].value] == [f"{tmp_path}/gcc", f"{tmp_path}/g++"]
    (tmp_path / "g++").unlink()
    assert report._c_compiler()[0].value == f"{tmp_path}/gcc"
    assert report._cxx_compiler()[0].text == "none: torch.compile cannot run on a CPU"


def test_what_a_gpu_runs_with_is_named_as_far_as_it_is_known(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 3))
    monkeypatch.setattr(report.facts, "machine", lambda device: {"driver": "570.86.15"})
    (fact,) = report._gpu_software(torch.device("cuda"))
    assert fact.text == "CUDA 12.8, driver 570.86.15, cuDNN 91002, NCCL 2.27.3"
    monkeypatch.setattr(torch.cuda.nccl, "version", broken)
    assert report._gpu_software(torch.device("cuda"))[0].text == "CUDA 12.8, driver 570.86.15, cuDNN 91002"
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: None)
    monkeypatch.setattr(report.facts, "NVIDIA_VERSION", __file__)  # a file that is there
    assert "an NVIDIA driver is here: install PyTorch with CUDA" in report._gpu_software(torch.device("cpu"))[0].text


def test_check_is_of_a_preset_s_heads(capsys):
    code, _, err = doctor(capsys, "--check", "--head-dim", "12")
    assert (code, err.strip()) == (
        2,
        "doctor: --check is of a preset's heads, got --head-dim 12; leave one of them out",
    )
