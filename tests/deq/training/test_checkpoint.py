"""Checkpoints and atomic files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from deq.records.errors import UserError
from deq.records.files import write_atomically
from deq.training import checkpoint

CONFIG: dict[str, Any] = {"window": 5, "epochs": 3, "solver": {"window": 5, "backend": "auto"}, "resume": None}
STATE: dict[str, Any] = {"weights": {"w": torch.arange(3.0)}, "step": 7, "rows": [{"train/loss": 0.1}], "rng": None}


def test_another_solver_is_named_before_the_knobs_that_it_has_not(tmp_path: Path) -> None:
    then = {"adjoint": {"_target_": "deq.solvers.Forward"}, "solver": {"_target_": "deq.solvers.Forward", "beta": 1.0}}
    now = {"adjoint": {"_target_": "deq.solvers.Forward"}, "solver": {"_target_": "deq.solvers.Anderson", "window": 5}}
    checkpoint.save(tmp_path / checkpoint.FILE, {}, then)
    with pytest.raises(UserError) as refusal:
        checkpoint.load(tmp_path, now)
    assert str(refusal.value) == (
        f"resume={tmp_path}: solver was deq.solvers.Forward in the checkpoint and is deq.solvers.Anderson now; choose "
        "the same solver to go on with that run, or leave resume out to start anew"
    )


def test_what_is_saved_is_loaded_to_the_bit(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / checkpoint.FILE, STATE, CONFIG)
    state, warnings = checkpoint.load(tmp_path, CONFIG)
    assert torch.equal(state["weights"]["w"], STATE["weights"]["w"])
    assert {**state, "weights": None} == {**STATE, "weights": None}
    assert warnings == []
    assert checkpoint.load(tmp_path / checkpoint.FILE, CONFIG)[0]["step"] == 7


def test_a_write_that_fails_halfway_leaves_the_previous_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_atomically(file, lambda opened: opened.write(b"whole"))

    def half(opened: BinaryIO) -> None:
        opened.write(b"ha")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match=r"disk full"):
        write_atomically(file, half)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert file.read_bytes() == b"whole"
    write_atomically(file, lambda opened: opened.write(b"next"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert file.read_bytes() == b"next"


def test_a_config_that_differs_in_what_matters_is_refused_by_key(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / checkpoint.FILE, STATE, CONFIG)
    with pytest.raises(UserError, match=r"window was 5 in the checkpoint and is 10 now; give window=5"):
        checkpoint.load(tmp_path, {**CONFIG, "window": 10, "solver": {"window": 10, "backend": "auto"}})


def test_a_longer_run_is_allowed_with_a_warning_and_a_new_place_without_one(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / checkpoint.FILE, STATE, CONFIG)
    _, warnings = checkpoint.load(tmp_path, {**CONFIG, "epochs": 9, "resume": "there"})
    assert len(warnings) == 1
    assert "epochs was 3 in the checkpoint and is 9 now" in warnings[0]


def test_what_is_no_checkpoint_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no checkpoint.pt"):
        checkpoint.load(tmp_path, CONFIG)
    with pytest.raises(UserError, match=r"there is no file or folder"):
        checkpoint.load(tmp_path / "nowhere", CONFIG)
    (tmp_path / "text").write_text("not a checkpoint")
    with pytest.raises(UserError, match=r"not a readable checkpoint"):
        checkpoint.load(tmp_path / "text", CONFIG)
    torch.save({"weights": 1}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"not written by this version"):
        checkpoint.load(tmp_path / "other.pt", CONFIG)


@pytest.mark.parametrize("key", ["format", "config", "state"])
def test_a_checkpoint_that_lacks_a_key_is_refused_in_a_sentence(key: str, tmp_path: Path) -> None:
    content = {"format": checkpoint._FORMAT, "config": CONFIG, "state": STATE}
    del content[key]
    torch.save(content, tmp_path / checkpoint.FILE)
    with pytest.raises(UserError, match=r"not written by this version's train.py"):
        checkpoint.load(tmp_path, CONFIG)


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "owned",))

    torch.save({"format": 1, "config": CONFIG, "state": Evil()}, tmp_path / checkpoint.FILE)
    with pytest.raises(UserError, match=r"not a readable checkpoint"):
        checkpoint.load(tmp_path, CONFIG)
    assert not (tmp_path / "owned").exists()
