"""The training loop: what it reports, how it stops, and that it goes on bit for bit."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deq.data import Batches, ImageData, digits
from deq.layer import Gradient, Implicit, JacobianFree, StabilityLosses
from deq.measure.crossover import Crossover
from deq.measure.probe import SpeedupProbe
from deq.models import EquilibriumClassifier
from deq.records.errors import UserError
from deq.records.machine import peak_resident_bytes, reset_peak_resident_bytes
from deq.records.metrics import NAMES
from deq.records.tracker import Tracker
from deq.records.wandb_run import WandbOptions
from deq.solvers import Anderson, Solver
from deq.training.display import Display
from deq.training.interrupt import Interrupted
from deq.training.trainer import Trainer

SOLVER = Anderson(window=3, tol=1e-2, max_iter=20)
STEPS_AN_EPOCH = 5


class StopsAt(Batches):
    """Batches that send this process a signal while step ``step`` is under way."""

    def __init__(self, data: ImageData, signum: int, step: int) -> None:
        super().__init__(data, 32, seed=0)
        self.signum, self.left = signum, step

    def train(self, epoch: int, start: int = 0) -> Any:
        for batch in super().train(epoch, start):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), self.signum)
            yield batch


def trainer(
    folder: Path,
    *,
    solver: Solver = SOLVER,
    gradient: Gradient | None = None,
    batches: Batches | None = None,
    saved: list[dict[str, Any]] | None = None,
    augment: str = "crop",
    **options: Any,
) -> Trainer:
    torch.manual_seed(0)
    batches = batches or Batches(digits(augment=augment, train_size=160, test_size=64), 32, seed=0)
    model = EquilibriumClassifier(
        1, 8, 10, solver=solver, gradient=gradient or Implicit(solver=solver), channels=8, inner=8, groups=4, pool=4
    )
    given: dict[str, Any] = {
        "epochs": 3, "max_steps": None, "schedule": "cosine", "precision": "fp32", "compile": False, "log_every": 2
    }  # fmt: skip
    return Trainer(
        model,
        batches,
        torch.optim.Adam(model.parameters(), lr=3e-3),
        **(given | options),
        probe=SpeedupProbe(repeats=1),
        tracker=Tracker(folder, {}, warn=print, options=WandbOptions(mode="disabled")),
        display=Display(),
        save=(saved if saved is not None else []).append,
    )


def without_clocks(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """What has to repeat: everything but seconds, ratios of seconds and memory."""
    clocks = {"speedup/solver", "speedup/forward_s", "speedup/solver_s", "memory/peak_bytes"}
    return [{k: v for k, v in row.items() if k not in clocks and not k.startswith("time/")} for row in rows]


def saved_through_a_file(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    torch.save(state, folder / "state.pt")
    loaded: dict[str, Any] = torch.load(folder / "state.pt", weights_only=True)
    return loaded


@pytest.mark.parametrize(
    ("step", "warm_start", "evaluate_every"),
    [(1, False, None), (7, False, None), (10, False, None), (8, True, None), (6, False, 3), (7, False, 3)],
    ids=[
        "first step", "middle of an epoch", "last step of an epoch", "warm starts", "before an evaluation within",
        "after an evaluation within",
    ],
)  # fmt: skip
def test_resumed_run_equals_uninterrupted_run(
    step: int, warm_start: bool, evaluate_every: int | None, tmp_path: Path
) -> None:
    more: dict[str, Any] = {"warm_start": warm_start, "evaluate_every": evaluate_every}
    whole = trainer(tmp_path / "whole", **more)
    expected = whole.run()

    saved: list[dict[str, Any]] = []
    data = digits(augment="crop", train_size=160, test_size=64)
    first = trainer(tmp_path / "first", **more, batches=StopsAt(data, signal.SIGINT, step), saved=saved)
    with pytest.raises(Interrupted):
        first.run()
    assert first.position.step == step

    second = trainer(tmp_path / "second", **more)
    torch.rand(13)  # the state of the generators has to come from the checkpoint
    second.restore(saved_through_a_file(saved[-1], tmp_path))
    result = second.run()

    assert without_clocks([result]) == without_clocks([expected])
    assert without_clocks(second.tracker.rows) == without_clocks(whole.tracker.rows)
    weights = whole.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in second.model.state_dict().items())


def test_a_run_with_stability_losses_resumes_bit_for_bit_as_well(tmp_path: Path) -> None:
    losses = StabilityLosses(jacobian_weight=0.5, jacobian_probability=0.5, corrections=(2, 4))
    whole = trainer(tmp_path / "whole", stability=losses)
    expected = whole.run()
    saved: list[dict[str, Any]] = []
    data = digits(augment="crop", train_size=160, test_size=64)
    first = trainer(tmp_path / "first", batches=StopsAt(data, signal.SIGINT, 7), saved=saved, stability=losses)
    with pytest.raises(Interrupted):
        first.run()
    second = trainer(tmp_path / "second", stability=losses)
    torch.rand(13)
    second.restore(saved_through_a_file(saved[-1], tmp_path))
    assert without_clocks([second.run()]) == without_clocks([expected])


def test_the_penalty_shapes_the_cell_and_each_added_loss_is_logged_under_its_own_name(tmp_path: Path) -> None:
    def summary(**losses: Any) -> dict[str, float]:
        # Without augmentation, which takes its numbers from the generator that the penalty draws from.
        return trainer(tmp_path / str(losses), epochs=6, augment="none", stability=StabilityLosses(**losses)).run()

    plain, corrected = summary(), summary(corrections=(2,), gamma=0.5)
    watched, penalised = summary(jacobian_weight=1e-12), summary(jacobian_weight=10.0)
    assert "train/jacobian_penalty" not in plain
    assert "train/correction_loss" not in plain | penalised
    assert watched["train/loss"] == pytest.approx(plain["train/loss"], rel=1e-3), "train/loss is the cross-entropy"
    assert 0 < penalised["train/jacobian_penalty"] < 0.8 * watched["train/jacobian_penalty"]
    assert penalised["solver/forward_evaluations"] < 0.6 * watched["solver/forward_evaluations"]
    # The iterate after two evaluations is about as good an answer as the last, and counts half.
    assert 0.4 * corrected["train/loss"] < corrected["train/correction_loss"] < 0.8 * corrected["train/loss"]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_stability_losses_in_half_precision_are_finite_and_train(precision: str, tmp_path: Path) -> None:
    losses = StabilityLosses(jacobian_weight=1.0, corrections=(3,))
    reference = trainer(tmp_path / "fp32", epochs=1, stability=losses).run()
    summary = trainer(tmp_path / "half", epochs=1, stability=losses, precision=precision).run()
    for name in ("train/loss", "train/jacobian_penalty", "train/correction_loss"):
        assert summary[name] == pytest.approx(reference[name], rel=0.1)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_end_saves_and_gives_the_handlers_back(signum: int, tmp_path: Path) -> None:
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    saved: list[dict[str, Any]] = []
    run = trainer(tmp_path, batches=StopsAt(digits(train_size=160, test_size=64), signum, 3), saved=saved)
    with pytest.raises(Interrupted) as caught:
        run.run()
    assert caught.value.signum == signum
    assert saved[-1]["position"]["step"] == 3
    assert run.account.summary()["train/loss"] > 0
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_summary_holds_every_promised_name_that_could_be_measured(tmp_path: Path) -> None:
    summary = trainer(tmp_path, epochs=1, crossover=Crossover(max_iter=4, repeats=1)).run()
    absent = set(NAMES) - set(summary)
    # No counter was read, nothing was added to the loss, and the learning rate belongs to a step; a probe that got
    # nowhere has no ratio, and four evaluations need no crossover.
    added = {"train/jacobian_penalty", "train/correction_loss"}
    assert absent <= added | {
        "optim/learning_rate",
        "energy/co2_grams",
        "crossover/residual",
        *(name for name in NAMES if name.endswith("_joules") or name.startswith("speedup/")),
    }
    assert 0 <= summary["solver/unconverged_fraction"] <= 1
    assert summary["time/train_s"] <= summary["time/elapsed_s"]
    assert summary["solver/forward_evaluations"] <= 20


def test_a_row_covers_the_steps_since_the_previous_row(tmp_path: Path) -> None:
    run = trainer(tmp_path, epochs=2)
    run.run()
    assert [row["step"] for row in run.tracker.rows] == [2, 4, 5, 7, 9, 10]
    assert [row["epoch"] for row in run.tracker.rows] == [1, 1, 1, 2, 2, 2]
    assert ["test/accuracy" in row for row in run.tracker.rows] == [False, False, True] * 2
    losses = [row["train/loss"] for row in run.tracker.rows]
    mean_of_steps = (2 * losses[3] + 2 * losses[4] + losses[5]) / STEPS_AN_EPOCH
    assert run.account.last_evaluation["train/loss"] == pytest.approx(mean_of_steps)


def test_evaluations_within_an_epoch_come_beside_those_at_its_end(tmp_path: Path) -> None:
    run = trainer(tmp_path, evaluate_every=3, epochs=2)
    summary = run.run()
    evaluated = [row for row in run.tracker.rows if "test/accuracy" in row]
    assert [row["step"] for row in evaluated] == [3, 5, 6, 9, 10]
    assert [row["step"] for row in run.tracker.rows] == [2, 3, 4, 5, 6, 7, 9, 10]
    assert summary["time/test_s"] == evaluated[-1]["time/test_s"] > 0
    assert summary["time/train_s"] + summary["time/test_s"] < summary["time/elapsed_s"]


def test_unconverged_fraction_pools_both_solves(tmp_path: Path) -> None:
    capped = Anderson(tol=1e-6, max_iter=2)
    summary = trainer(tmp_path, epochs=1, gradient=Implicit(solver=capped)).run()
    assert summary["solver/backward_unconverged_fraction"] == 1.0
    assert summary["solver/backward_converged_steps"] == 0.0
    assert summary["solver/backward_evaluations"] == 2.0
    forward = summary["solver/forward_unconverged_fraction"]
    assert summary["solver/unconverged_fraction"] == pytest.approx((forward + 1) / 2)


@pytest.mark.parametrize("compact", [False, True])
def test_a_sample_takes_part_in_fewer_evaluations_only_where_the_solver_compacts(compact: bool, tmp_path: Path) -> None:
    solver = Anderson(window=3, tol=1e-3, max_iter=30, compact=compact)
    run = trainer(tmp_path, solver=solver, gradient=Implicit(solver=solver), epochs=1)
    summary = run.run()
    forward, backward = (
        (summary[f"solver/{side}_sample_evaluations"], summary[f"solver/{side}_evaluations"])
        for side in ("forward", "backward")
    )
    if compact:
        assert 1 < forward[0] < forward[1]
        assert backward[0] > 1
    else:
        assert forward[0] == pytest.approx(forward[1])
        assert backward[0] == pytest.approx(backward[1])
    assert all("solver/forward_sample_evaluations" in row for row in run.tracker.rows)


def test_warm_starts_change_nothing_in_the_first_epoch_and_save_evaluations_in_the_later_ones(tmp_path: Path) -> None:
    cold, warm = (
        trainer(tmp_path / str(warm), warm_start=warm, augment="none", schedule="constant", log_every=STEPS_AN_EPOCH)
        for warm in (False, True)
    )
    cold.run()
    warm.run()
    assert without_clocks(warm.tracker.rows[:1]) == without_clocks(cold.tracker.rows[:1])
    for row, other in zip(warm.tracker.rows[1:], cold.tracker.rows[1:], strict=True):
        assert row["solver/forward_evaluations"] < other["solver/forward_evaluations"]
        assert row["solver/forward_residual"] <= SOLVER.tol
    assert warm.account.last_evaluation["test/loss"] == pytest.approx(
        cold.account.last_evaluation["test/loss"], rel=0.02
    )


def test_a_checkpoint_without_starts_is_refused_by_a_run_with_them(tmp_path: Path) -> None:
    state = trainer(tmp_path / "cold", max_steps=1).state()
    with pytest.raises(UserError, match=r"does not fit this version's train.py"):
        trainer(tmp_path / "warm", max_steps=1, warm_start=True).restore(state)


def test_no_backward_names_without_a_backward_solve(tmp_path: Path) -> None:
    summary = trainer(tmp_path, epochs=1, gradient=JacobianFree()).run()
    assert not [name for name in summary if name.startswith("solver/backward")]
    assert "solver/forward_evaluations" in summary


def test_max_steps_ends_the_run_with_an_evaluation_and_the_rest_can_be_resumed(tmp_path: Path) -> None:
    saved: list[dict[str, Any]] = []
    run = trainer(tmp_path / "short", max_steps=7, schedule="constant", saved=saved)
    assert "test/accuracy" in run.run()
    assert run.position.step == 7
    longer = trainer(tmp_path / "long", max_steps=None, schedule="constant")
    longer.restore(saved[-1])
    longer.run()
    assert longer.position.step == 15
    whole = trainer(tmp_path / "whole", schedule="constant")
    whole.run()
    assert longer.account.last_evaluation["test/loss"] == whole.account.last_evaluation["test/loss"]


def test_a_checkpoint_beyond_the_last_step_is_refused_instead_of_trained_on_for_ever(tmp_path: Path) -> None:
    saved: list[dict[str, Any]] = []
    trainer(tmp_path / "long", max_steps=7, schedule="constant", saved=saved).run()
    shorter = trainer(tmp_path / "short", max_steps=3, schedule="constant")
    with pytest.raises(UserError, match=r"the checkpoint is at step 7, but epochs and max_steps allow only 3"):
        shorter.restore(saved[-1])


@pytest.mark.parametrize("key", ["position", "model", "rng"])
def test_a_state_that_lacks_a_key_is_refused_in_a_sentence(key: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=1)
    state = run.state()
    del state[key]
    with pytest.raises(UserError, match=rf"does not fit this version's train.py \(KeyError: '{key}'\)"):
        run.restore(state)


def test_learning_rate_follows_half_a_cosine_to_zero(tmp_path: Path) -> None:
    run = trainer(tmp_path, epochs=2, log_every=5)
    run.run()
    assert [row["optim/learning_rate"] for row in run.tracker.rows] == pytest.approx([1.5e-3, 0.0])


def test_a_loss_that_is_not_finite_ends_the_run_with_a_sentence(tmp_path: Path) -> None:
    run = trainer(tmp_path)

    def poison(module: torch.nn.Module, args: Any, logits: Tensor) -> Tensor | None:
        return logits * float("nan") if run.position.step == 3 else None

    run.model.register_forward_hook(poison)
    with pytest.raises(UserError, match=r"NaN or infinite since a step between 3 and 4; lower optim.lr, now 0.003"):
        run.run()


def test_fp16_steps_that_overflow_are_skipped_by_the_scaler_and_training_goes_on(tmp_path: Path) -> None:
    run = trainer(tmp_path, precision="fp16", epochs=1, log_every=5)

    def overflow(module: torch.nn.Module, args: Any, logits: Tensor) -> Tensor | None:
        return logits * float("inf") if run.position.step == 1 else None

    run.model.register_forward_hook(overflow)
    assert run.run()["train/loss"] < 10
    assert run._scaler.get_scale() == 2.0**15  # halved, once
    assert all(torch.isfinite(value).all() for value in run.model.state_dict().values())


def test_the_learning_rate_waits_where_the_scaler_skips_a_step(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    run = trainer(tmp_path, precision="fp16", epochs=1, log_every=5)

    def overflow(module: torch.nn.Module, args: Any, logits: Tensor) -> Tensor | None:
        return logits * float("inf") if run.position.step == 0 else None

    run.model.register_forward_hook(overflow)
    run.run()
    assert run.position.step == 5
    assert run._schedule.last_epoch == 4
    (state,) = {int(state["step"]) for state in run.optimizer.state.values()}
    assert state == 4
    assert not [str(warning.message) for warning in recwarn if "lr_scheduler" in str(warning.message)]


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_half_precision_trains_as_fp32_does(precision: str, dtype: torch.dtype, tmp_path: Path) -> None:
    reference = trainer(tmp_path / "fp32", epochs=4, augment="none").run()
    run = trainer(tmp_path / "half", precision=precision, epochs=4, augment="none")
    seen: set[tuple[str, torch.dtype]] = set()

    def note(module: torch.nn.Module, args: Any, output: Tensor) -> None:
        seen.add((type(module).__name__, output.dtype))

    for module in (*run.model.deq.cell.modules(), run.model.deq):  # type: ignore[union-attr]
        module.register_forward_hook(note)
    summary = run.run()
    # The cell's products are in half precision, the equilibrium is not.
    assert ("Conv2d", dtype) in seen
    assert {kind for kind in seen if kind[0] == "DEQ"} == {("DEQ", torch.float32)}
    assert all(value.dtype != dtype for value in run.model.state_dict().values())
    assert summary["train/loss"] == pytest.approx(reference["train/loss"], rel=0.02)
    assert summary["test/accuracy"] == pytest.approx(reference["test/accuracy"], abs=0.1)
    assert summary["solver/forward_evaluations"] == pytest.approx(reference["solver/forward_evaluations"], rel=0.1)
    assert summary["solver/unconverged_fraction"] <= reference["solver/unconverged_fraction"] + 0.05


def test_the_peak_of_memory_is_that_of_this_run_not_of_an_earlier_one_in_the_process() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        pytest.skip(f"this system does not reset the peak ({error})")
    big = torch.ones(64 * 2**20)
    reset_peak_resident_bytes()
    with_it = peak_resident_bytes()
    del big
    reset_peak_resident_bytes()
    assert peak_resident_bytes() < with_it - 200 * 2**20
