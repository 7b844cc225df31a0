"""Ops: what is wrong or cannot run is refused before it is timed, and tiles are tried one field at a time."""

import pytest
import torch

from engine.tuning.ops import OPS, Bench
from kernels import alternatives, dispatch, tiles
from kernels.cases import Sizes

CPU = torch.device("cpu")
SIZES = Sizes(B=2, T=33, H=2, D=16, V=61, Vp=64)


@pytest.fixture
def bench() -> Bench:
    """A CPU, small sizes, eager."""
    return Bench(SIZES, "fp32", torch.float32, CPU, is_compiled=False)


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_a_race_of_right_implementations(bench, op):
    found, tuned = bench.tune(op, "torch", {}, until=0.0)
    assert tuned == {}
    assert found.seconds["torch"]
    assert "triton" not in found.seconds
    assert all(reason for reason in found.left.values())


def test_what_a_cpu_cannot_run_is_refused_with_its_reason(bench):
    found, _ = bench.tune("attention", "torch", {}, until=0.0)
    assert "No viable backend" in found.left["cudnn"]
    assert {"torch", "flash", "math"} == set(found.seconds)


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_a_wrong_implementation_is_refused_and_names_the_tensor(bench, monkeypatch, factor):
    right = alternatives.attention_math
    monkeypatch.setattr(alternatives, "attention_math", lambda qkv, **options: factor * right(qkv, **options))
    found, _ = bench.tune("attention", "torch", {}, until=0.0)
    assert found.left["math"].startswith("wrong: out is off by ")
    assert "math" not in found.seconds


def test_a_wrong_gradient_is_refused_though_the_output_is_right(bench, monkeypatch):
    right = alternatives.attention_math

    def detached(qkv, **options):
        out = right(qkv, **options)
        return out.detach() + 0.999 * (out - out.detach())

    monkeypatch.setattr(alternatives, "attention_math", detached)
    assert bench.tune("attention", "torch", {}, until=0.0)[0].left["math"].startswith("wrong: dqkv is off by ")


def test_where_the_shipped_implementation_is_wrong_the_next_takes_its_place(bench, monkeypatch):
    monkeypatch.setattr(dispatch.MODULES["attention"], "attention_torch", lambda qkv, **_: qkv[:, :, 0] * 1.0)
    found, _ = bench.tune("attention", "torch", {}, until=0.0)
    assert next(iter(found.seconds)) == "flash"
    assert found.left["torch"].startswith("wrong: out")


def test_logits_that_could_fill_a_cpu_s_memory_are_not_stored(monkeypatch):
    large = Bench(Sizes(16, 1024, 12, 64, 50257, 50304), "fp32", torch.float32, CPU, is_compiled=False)
    assert "unchunked" not in large.names("linear_cross_entropy", "torch")


# ---- Tiles: a made-up kernel whose time depends on its configuration ----------------------------------------------


@pytest.fixture
def tuned_tiles(bench, monkeypatch):
    """Tunes the tiles of a kernel of which BLOCK = 64 with 4 warps is the fastest; counts what was launched."""
    monkeypatch.setitem(tiles.FIELDS, "made", ("BLOCK", "num_warps"))
    monkeypatch.setitem(tiles.TABLE, "made", {"default": {1: (128, 8)}})
    monkeypatch.setattr(tiles, "architecture", lambda device: "default")
    launched, wrong = [], []

    def launch() -> dict:
        configs = []
        tiles.with_config("made", 1, CPU, lambda **config: configs.append(config))
        launched.append(tuple(configs[0].values()))
        if configs[0]["BLOCK"] > 128:
            raise RuntimeError("out of resource: shared memory")
        return configs[0]

    def sample() -> float:
        config = launch()
        return 1.0 + abs(config["BLOCK"] - 64) / 64 + abs(config["num_warps"] - 4) / 8

    def check(op: str, fn: object) -> None:
        if launch()["BLOCK"] in wrong:
            raise ArithmeticError("wrong: out is off by 1.0e+00")

    monkeypatch.setattr(bench, "check", check)
    monkeypatch.setattr(bench, "function", lambda op, name: None)

    def tune(*wrong_blocks: int, tuned=None, until: float = 1e18) -> tuple[dict, list]:
        wrong.extend(wrong_blocks)
        return bench.tune_tiles("made", sample, tuned or {}, until), launched

    yield tune
    tiles.use({})


def test_the_fastest_neighbour_is_found_one_field_at_a_time(tuned_tiles):
    found, launched = tuned_tiles()
    assert found == {"made 1": {"BLOCK": 64, "num_warps": 4}}
    assert set(launched) == {(128, 8), (256, 8), (64, 8), (64, 16), (64, 4)}  # 256 does not fit


def test_a_wrong_tile_is_never_timed_into_the_choice(tuned_tiles):
    assert tuned_tiles(64)[0] == {"made 1": {"BLOCK": 128, "num_warps": 4}}


def test_without_time_the_shipped_tiles_stay(tuned_tiles):
    found, launched = tuned_tiles(until=0.0)
    assert (found, set(launched)) == ({}, {(128, 8)})


def test_a_kernel_that_another_op_has_tuned_keeps_its_tile(tuned_tiles):
    tuned = {"made 1": {"BLOCK": 32, "num_warps": 2}}
    assert tuned_tiles(tuned=tuned) == (tuned, [(32, 2)])
