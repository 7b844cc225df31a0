"""Tiles: which entry of the table a launch gets, and what a tuning changes."""

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


# ---- Configurations of a tuning -----------------------------------------------------------------------------------


@pytest.fixture
def on_sm_90(three, monkeypatch):
    """A fake sm_90 GPU, and no configurations in use before or after the test."""
    monkeypatch.setattr(tiles, "architecture", lambda device: "sm_90")
    tiles.use({})
    yield
    tiles.use({})


def launched(size: int) -> dict:
    started = []
    tiles.with_config("three", size, torch.device("cuda"), lambda **config: started.append(config))
    return started[0]


def test_a_launch_takes_the_configuration_in_use_for_its_entry_and_else_the_table_s(on_sm_90):
    assert launched(100) == {"BLOCK": 64, "num_warps": 4}
    tiles.use({"three 128": {"BLOCK": 16, "num_warps": 1}})
    assert launched(100) == launched(128) == {"BLOCK": 16, "num_warps": 1}
    assert launched(64) == {"BLOCK": 128, "num_warps": 8}
    tiles.use({})
    assert launched(100) == {"BLOCK": 64, "num_warps": 4}


def test_what_was_launched_is_known_by_the_keys_that_use_takes(on_sm_90):
    launched(100)
    assert tiles.used() == {"three 128": {"BLOCK": 64, "num_warps": 4}}
    tiles.use(tiles.used())
    assert tiles.used() == {}


def test_a_configuration_is_looked_up_once_for_a_name_size_and_device(on_sm_90, monkeypatch):
    launched(100)
    monkeypatch.setattr(tiles, "architecture", lambda device: pytest.fail("looked up again"))
    assert launched(100) == {"BLOCK": 64, "num_warps": 4}


def test_neighbours_differ_in_one_field_and_can_be_launched(three, monkeypatch):
    config = {"BLOCK": 1, "num_warps": 32, "num_stages": 2}
    assert tiles.neighbours("three/16bit 64", config, "BLOCK") == [{**config, "BLOCK": 2}]
    assert tiles.neighbours("three/16bit 64", config, "num_warps") == [{**config, "num_warps": 16}]
    assert [near["num_stages"] for near in tiles.neighbours("three 64", config, "num_stages")] == [3, 1]


def test_a_variant_of_a_kernel_is_a_field_with_values_of_its_own(three, monkeypatch):
    monkeypatch.setitem(tiles.VARIANTS, "three", {"POLYNOMIAL": (0, 1, 2)})
    shipped = lookup("three", "sm_90", 64)
    assert shipped == {"BLOCK": 128, "num_warps": 8}
    assert tiles.fields("three 64", shipped) == ["POLYNOMIAL", "BLOCK", "num_warps"]
    assert [near["POLYNOMIAL"] for near in tiles.neighbours("three 64", shipped, "POLYNOMIAL")] == [1, 2]


def test_a_tile_that_an_option_needs_is_tried_with_it_only():
    shipped = lookup("attention_bwd/16bit", "sm_90", 64)
    assert tiles.neighbours("attention_bwd/16bit 64", shipped, "BLOCK_ROWS") == []
    (one_launch,) = tiles.neighbours("attention_bwd/16bit 64", shipped, "ONE_LAUNCH")
    assert one_launch == {**shipped, "ONE_LAUNCH": 1}
    assert len(tiles.neighbours("attention_bwd/16bit 64", one_launch, "BLOCK_ROWS")) == 2
