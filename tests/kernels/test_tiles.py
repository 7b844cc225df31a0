"""Tiles: which entry of the table a launch gets, and what GPT2_AUTOTUNE=1 changes."""

import pytest
import torch

from kernels import tiles
from kernels.aot import SHARED_LIMIT
from kernels.tiles import FIELDS, TABLE, lookup

CPU = torch.device("cpu")


@pytest.fixture
def three(monkeypatch) -> None:
    """Adds a kernel with three entries on sm_90 and one default to the tables."""
    monkeypatch.setitem(FIELDS, "three", ("BLOCK", "num_warps"))
    monkeypatch.setitem(
        TABLE, "three", {"sm_90": {64: (128, 8), 128: (64, 4), 256: (32, 2)}, "default": {256: (16, 1)}}
    )
    monkeypatch.setattr(tiles, "_tuned", {})


@pytest.mark.parametrize(
    ("size", "block"), [(1, 128), (64, 128), (65, 64), (128, 64), (129, 32), (256, 32), (9999, 32)]
)
def test_a_size_takes_the_next_larger_entry_or_the_last(three, size, block):
    assert lookup("three", "sm_90", size)["BLOCK"] == block


def test_an_unknown_architecture_takes_the_default(three):
    assert lookup("three", "sm_120", 64) == {"BLOCK": 16, "num_warps": 1}


def test_every_entry_has_a_number_for_each_field_and_a_default():
    for name, rows in TABLE.items():
        fields = FIELDS[name.partition("/")[0]]
        assert "default" in rows, name
        for arch, sizes in rows.items():
            assert arch == "default" or arch in SHARED_LIMIT
            assert list(sizes) == sorted(sizes)
            for entry in sizes.values():
                assert len(entry) == len(fields)
                warps = entry[fields.index("num_warps")]
                assert warps & (warps - 1) == 0
                blocks = [n for field, n in zip(fields, entry, strict=True) if field.startswith("BLOCK")]
                assert all(n & (n - 1) == 0 for n in blocks)


VARIANT_ONLY = {"attention_bwd/16bit"}  # Blackwell takes its default entries


@pytest.mark.parametrize("name", [n for n in TABLE if n.startswith("attention") and n not in VARIANT_ONLY])
def test_attention_has_a_row_for_every_architecture_that_is_promised(name):
    assert {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "default"} <= set(TABLE[name])
    assert all(max(sizes) == 256 for sizes in TABLE[name].values())


def test_architecture_is_the_devices_own(monkeypatch):
    monkeypatch.setattr(tiles, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert tiles.architecture(torch.device("cuda", 0)) == "sm_86"
    monkeypatch.setattr(tiles, "INTERPRETED", True)
    assert tiles.architecture(CPU) == "default"


# ---- Tuning: start(**config) stands for a launch, and a table of made-up times for the GPU ------------------------


def tune(times: dict[tuple, float], shipped=(128, 8)) -> tuple[dict, list]:
    """Chosen configuration, and every (BLOCK, num_warps) that was timed; those not in `times` take 9 ms."""
    tried = []

    def start(BLOCK: int, num_warps: int) -> None:
        tried.append((BLOCK, num_warps))

    def time_ms(run) -> float:
        run()
        if times.get(tried[-1]) is None and tried[-1] in times:
            raise RuntimeError("out of resource: shared memory")
        return times.get(tried[-1], 9.0)

    shipped = dict(zip(("BLOCK", "num_warps"), shipped, strict=True))
    return tiles._tune("three", "sm_90", 64, shipped, start, time_ms), tried


def test_tuning_takes_the_fastest_neighbour_and_prints_the_tables_line(three, capsys):
    best, tried = tune({(128, 8): 2.0, (256, 4): 1.5})
    assert best == {"BLOCK": 256, "num_warps": 4}
    assert tried[0] == (128, 8)  # the shipped one
    assert sorted(tried) == sorted((b, w) for b in (64, 128, 256) for w in (4, 8, 16))
    assert "three sm_90 64: (256, 4)  # 1.5000 ms, was 2.0000" in capsys.readouterr().err


def test_tuning_happens_once_for_a_kernel_and_size(three):
    assert tune({(128, 8): 2.0, (256, 4): 1.5})[0] == tune({})[0]
    assert tune({})[1] == []


def test_a_neighbour_that_cannot_run_is_left_out_and_the_shipped_one_must(three, capsys):
    best, _ = tune({(128, 8): 2.0, (256, 8): None})
    assert best == {"BLOCK": 128, "num_warps": 8}
    assert "(256, 8) left out, RuntimeError" in capsys.readouterr().err
    tiles._tuned.clear()
    with pytest.raises(RuntimeError, match="out of resource"):
        tune({(128, 8): None})


def test_tuning_never_leaves_what_can_be_launched(three):
    _, tried = tune({}, shipped=(1, 32))
    assert all(block >= 1 and 1 <= warps <= 32 for block, warps in tried)


def test_without_the_variable_nothing_is_timed(three, monkeypatch):
    monkeypatch.delenv("GPT2_AUTOTUNE", raising=False)
    monkeypatch.setattr(tiles, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(tiles, "_tune", lambda *args: pytest.fail("tuned"))
    started = []
    tiles.with_config("three", 64, torch.device("cuda"), lambda **config: started.append(config))
    assert started == [{"BLOCK": 128, "num_warps": 8}]


def test_with_the_variable_all_but_in_place_kernels_are_tuned(three, monkeypatch):
    monkeypatch.setenv("GPT2_AUTOTUNE", "1")
    monkeypatch.setattr(tiles, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(tiles, "_tune", lambda *args: {"BLOCK": 1, "num_warps": 1})
    started = []
    for in_place in (False, True):
        tiles.with_config("three", 64, torch.device("cuda"), lambda **c: started.append(c), in_place=in_place)
    tiles.with_config("three", 64, CPU, lambda **c: started.append(c))
    assert [config["BLOCK"] for config in started] == [1, 128, 128]
