"""The one list of what is logged. The tracker refuses a name that is not here."""

from __future__ import annotations

from collections.abc import Iterable

NAMES: dict[str, str] = {
    "train/loss": "cross-entropy over the training steps since the previous row, nats per sample",
    "train/accuracy": "share of training samples classified rightly, in the forward passes of training",
    "train/jacobian_penalty": "estimate of the cell's squared Frobenius norm over d, mean over the steps that took it",
    "train/correction_loss": "weighted cross-entropy at iterates on the way, mean over training steps, nats per sample",
    "test/loss": "cross-entropy over the test set, nats per sample",
    "test/accuracy": "share of test samples classified rightly",
    "optim/learning_rate": "learning rate of the latest step",
    "time/elapsed_s": "wall-clock seconds since training began, evaluation and probe included",
    "time/train_s": "seconds spent in training steps and in drawing their batches; no evaluation, probe, checkpoint",
    "time/test_s": "seconds spent in evaluation on the test set",
    "time/step_s": "mean seconds a training step, over the steps since the previous row",
    "solver/forward_evaluations": "evaluations of f per forward solve of a batch, mean over training steps",
    "solver/backward_evaluations": "evaluations of f's transposed Jacobian per adjoint solve, mean over steps",
    "solver/forward_sample_evaluations": "evaluations of f that a sample took part in, mean over samples and steps",
    "solver/backward_sample_evaluations": "the same of adjoint solves, what is recorded again for compaction included",
    "solver/forward_residual": "relative residual of the equilibrium, mean over samples",
    "solver/backward_residual": "relative residual of the adjoint, mean over samples",
    "solver/unconverged_fraction": "share of samples above tol when their solve ended, both solves pooled",
    "solver/forward_unconverged_fraction": "the same, forward solves alone",
    "solver/backward_unconverged_fraction": "the same, adjoint solves alone",
    "solver/forward_converged_steps": "share of training steps whose forward solve met its stopping test",
    "solver/backward_converged_steps": "share of training steps whose adjoint solve met its stopping test",
    "speedup/solver": "probe: forward iteration's seconds over the run's solver's, to the same residual",
    "speedup/evaluations": "probe: forward iteration's evaluations over the run's solver's",
    "speedup/forward_evaluations": "probe: evaluations of f that forward iteration needed",
    "speedup/solver_evaluations": "probe: evaluations of f that the run's solver needed",
    "speedup/forward_s": "probe: seconds that forward iteration needed, median of the repeats",
    "speedup/solver_s": "probe: seconds that the run's solver needed, median of the repeats",
    "speedup/forward_residual": "probe: relative residual where forward iteration ended, as its test reads it",
    "speedup/solver_residual": "probe: relative residual where the run's solver ended, as its test reads it",
    "crossover/mixing_penalty_s": "traces: seconds an iteration of the run's solver takes above a forward one",
    "crossover/mixing_penalty": "traces: the same over the seconds of forward iteration's, 0.1 being 10 % more",
    "crossover/residual": "traces: mean relative residual below which the run's solver is ahead in seconds",
    "energy/gpu_joules": "measured by the GPU's own counter since training began: training and evaluation",
    "energy/train_gpu_joules": "of these, training steps",
    "energy/test_gpu_joules": "of these, evaluation",
    "energy/epoch_gpu_joules": "of these, since the previous evaluation: one epoch's, unless evaluate_every is set",
    "energy/cpu_joules": "measured by the CPUs' own counters since training began: training and evaluation",
    "energy/train_cpu_joules": "of these, training steps",
    "energy/test_cpu_joules": "of these, evaluation",
    "energy/epoch_cpu_joules": "of these, since the previous evaluation: one epoch's, unless evaluate_every is set",
    "energy/co2_grams": "all measured joules times the grid intensity that the user gave, grams of CO2",
    "energy/tflop": "a proxy, computed: 1e12 floating-point operations of the cell, training and evaluation",
    "energy/train_tflop": "of these, training steps: evaluations of the cell, products with its Jacobian, gradients",
    "energy/test_tflop": "of these, evaluation",
    "memory/peak_bytes": "peak memory: the allocator's on a CUDA device, the process's resident set on a CPU",
}
"""Name → meaning and unit. A name is logged only in rows where it was measured."""


CHARTS: dict[str, str] = {
    "traces/residual_against_evaluations": "mean relative residual of one batch after each evaluation of f, by solver",
    "traces/residual_against_seconds": "the same against seconds since the solve began",
}
"""Name -> meaning of the charts that a run draws into W&B at its end."""


def check(names: Iterable[str]) -> None:
    """Raise ValueError, naming it, for any name outside :data:`NAMES`."""
    for name in names:
        if name not in NAMES:
            raise ValueError(f"metric {name!r} is not in deq/records/metrics.py; add it to NAMES there, with its unit")


def check_charts(names: Iterable[str]) -> None:
    """Raise ValueError, naming it, for any name outside :data:`CHARTS`."""
    for name in names:
        if name not in CHARTS:
            raise ValueError(f"chart {name!r} is not in deq/records/metrics.py; add it to CHARTS there")
