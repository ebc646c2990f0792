"""Launch shapes: by rule, or from a table that was measured."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from deq.kernels import AndersonWindow, launch
from deq.kernels.triton_backend import _device_key
from tests.conftest import KERNEL_DEVICE


@pytest.fixture
def read_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> object:
    def read(table: object) -> None:
        path = tmp_path / "shapes.json"
        path.write_text(json.dumps(table) if not isinstance(table, str) else table)
        monkeypatch.setenv(launch.OVERRIDE, str(path))
        launch._table.cache_clear()
        launch._table()

    yield read
    launch._table.cache_clear()


def test_a_table_replaces_the_rule_on_its_device_alone(read_table) -> None:  # type: ignore[no-untyped-def]
    rule = launch.split_shape(49_152, 5)
    read_table({"A GPU": {"split, 8 rows, 4 bytes": [2048, 8], "fused, 1024 elements, 8 rows, 4 bytes": [1024, 1]}})
    assert launch.split_shape(49_152, 5, device="A GPU") == (2048, 24, 8)
    assert launch.split_shape(49_152, 8, device="A GPU") == (2048, 24, 8), "of one power of two"
    for other in (
        launch.split_shape(49_152, 5, device="another GPU"),
        launch.split_shape(49_152, 5, itemsize=(2, 2), device="A GPU"),
    ):
        assert other == rule
    assert launch.split_shape(49_152, 9, device="A GPU") == launch.split_shape(49_152, 9)
    assert launch.fused_shape(1000, 5, device="A GPU") == (1024, 1)
    assert launch.fused_shape(600, 5, itemsize=(4, 2), device="A GPU") == launch.fused_shape(600, 5, itemsize=(4, 2))


@pytest.mark.parametrize(
    "table",
    [
        "no json",
        [],
        {"A GPU": []},
        {"A GPU": {"key": [1000, 4]}},
        {"A GPU": {"key": [1024, 3]}},
        {"A GPU": {"key": [8, 1]}},
        {"A GPU": {"key": [1024]}},
        {"A GPU": {"key": [1024, 64]}},
    ],
)
def test_a_table_that_makes_no_sense_is_named(table: object, read_table) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"shapes\.json.*(unset|benchmarks\.tune)"):
        read_table(table)


def test_the_packaged_table_makes_sense() -> None:
    launch.check_table(json.loads(launch.TABLE.read_text()), str(launch.TABLE))


def test_an_update_runs_with_the_shape_of_the_table(read_table, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    X = torch.randn(4, 2, 5000, device=KERNEL_DEVICE)

    def run(blocks: int) -> torch.Tensor:
        window = AndersonWindow(2, 5000, window=2, device=KERNEL_DEVICE, backend="triton")
        for x, f in itertools.pairwise(X):
            out = window.step(x, f)
        assert window._backend._partial.shape[1] == blocks
        return out

    expected = run(5)
    read_table({_device_key(X.device): {"split, 2 rows, 4 bytes": [2048, 4]}})
    torch.testing.assert_close(run(3), expected, rtol=1e-5, atol=1e-5)
