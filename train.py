"""Train a deep equilibrium network with Anderson extrapolation: ``python train.py solver=anderson window=5``.

On two CPU cores the defaults reach 98.5 % of scikit-learn's handwritten digits in under a minute. Every knob and
group is on one page: ``python train.py --help``. Hydra composes ``conf/`` into one config and makes the run's folder
under ``runs/``; the loop is in ``deq/training/trainer.py``, the equilibrium layer in ``deq/layer/layer.py``.
"""

from __future__ import annotations

import contextlib
import json
import signal
from pathlib import Path
from typing import Any
from warnings import catch_warnings

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports just ends the process, without a trace

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from deq.cli.build import (
    build,
    build_model,
    pick_device,
    refuse_corrections_out_of_reach,
    refuse_graphs_without_device,
    refuse_what_the_tutorial_lacks,
    try_optimizer,
    try_solvers,
)
from deq.cli.command import launch, objective, resume_hint
from deq.cli.folders import claim
from deq.cli.limits import validate
from deq.data import Batches, ImageData
from deq.layer import Gradient, Implicit, StabilityLosses
from deq.measure.crossover import Crossover
from deq.measure.energy import EnergyMeter, EnergyOptions
from deq.measure.probe import SpeedupProbe
from deq.records.errors import UserError, first_line, values_of_the_user
from deq.records.files import shown
from deq.records.tracker import Tracker
from deq.records.wandb_run import WandbOptions
from deq.solvers import Solver
from deq.training import checkpoint
from deq.training.display import Display, described
from deq.training.interrupt import Interrupted
from deq.training.trainer import Trainer, count_parameters


def main(config: DictConfig) -> float | tuple[float, ...]:
    """Compose, build, train. Returns the run's ``objective``, for a sweeper that tunes."""
    display = Display()
    folder = Path(HydraConfig.get().runtime.output_dir)
    plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]

    # Everything a user can get wrong is looked at before any work.
    validate(config)
    sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    resume, done = claim(folder, config.resume, plain, in_sweep=sweep)
    if done:
        display.say(f"job {HydraConfig.get().job.num} is done already: {shown(folder)}")
        return objective(json.loads((folder / "summary.json").read_text()), plain["objective"])
    device = pick_device(config.device)
    refuse_graphs_without_device(config.cuda_graph, device)
    solver, gradient = build(config, "solver", Solver), build(config, "gradient", Gradient)
    logger = build(config, "logger", WandbOptions)
    probe = build(config, "probe", SpeedupProbe) if config.probe is not None else None
    stability = build(config, "stability", StabilityLosses) if config.stability is not None else None
    crossover = build(config, "crossover", Crossover) if config.crossover is not None else None
    energy_options = (
        build(config, "energy", EnergyOptions) if config.energy is not None else EnergyOptions(measure=False)
    )
    make_optimizer = instantiate(config.optim.optimizer)
    try_optimizer(make_optimizer)
    refuse_corrections_out_of_reach(stability, solver, config.cuda_graph)
    with values_of_the_user():
        if crossover is not None:
            crossover.solvers(solver)  # its windows suit the solver
    adjoint = gradient.solver if isinstance(gradient, Implicit) else None
    solvers = {"solver": solver} | ({"adjoint": adjoint} if adjoint is not None else {})
    refuse_what_the_tutorial_lacks(config, solvers.values())
    try_solvers(solvers, device)
    state = None
    if resume is not None:
        state, warnings = checkpoint.load(str(resume), plain)
        for warning in warnings:
            display.warn(warning)

    torch.manual_seed(config.seed)
    with catch_warnings(record=True) as told:  # of files left out
        data = build(config, "data", ImageData).to(device)
    for sentence in dict.fromkeys(str(warning.message) for warning in told):
        display.warn(sentence)
    batches = Batches(data, config.batch_size, config.seed)
    model: Any = build_model(
        config,
        image_channels=data.channels,
        image_size=data.size,
        classes=len(data.classes),
        solver=solver,
        gradient=gradient,
    ).to(device)
    optimizer = make_optimizer(model.parameters())

    energy = EnergyMeter(energy_options, device, warn=display.warn)
    choices: Any = HydraConfig.get().runtime.choices
    tracker = Tracker(
        folder,
        plain,
        warn=display.warn,
        options=logger,
        group=Path(HydraConfig.get().sweep.dir).name if sweep else None,
        tags=tuple(str(choices[group]) for group in ("data", "model", "solver")),
        overrides=HydraConfig.get().overrides.task,
        counters=energy.counters,
        anew=resume is None,
    )
    trainer = Trainer(
        model,
        batches,
        optimizer,
        epochs=config.epochs,
        max_steps=config.max_steps,
        schedule=config.optim.schedule,
        precision=config.precision,
        compile=config.compile,
        warm_start=config.warm_start,
        log_every=config.log_every,
        evaluate_every=config.evaluate_every,
        probe=probe,
        crossover=crossover,
        energy=energy,
        tracker=tracker,
        display=display,
        stability=stability,
        save=lambda state: checkpoint.save(folder / checkpoint.FILE, state, plain),
    )
    if state is not None:
        trainer.restore(state)
    display.say(
        f"{choices.model} model, {count_parameters(model):,} parameters · {choices.data}, {len(data.train):,} + "
        f"{len(data.test):,} images · {device}\n{described(solver)}"
    )
    try:
        summary = trainer.run()
    except BaseException as error:
        with contextlib.suppress(UserError):  # a disk that is full has been told of
            interrupted = isinstance(error, Interrupted | KeyboardInterrupt)
            how = "interrupted" if interrupted else "failed"
            tracker.finish(trainer.account.summary(), state=how, error=None if interrupted else first_line(error))
        if isinstance(error, Interrupted):
            display.say(f"stopped by {error} at step {trainer.position.step}; go on with:\n  {resume_hint(folder)}")
        raise
    tracker.finish(summary)
    notes = {"files": shown(folder)} | ({"W&B": tracker.wandb_note} if tracker.wandb_note else {})
    display.table(summary, trainer.comparison, notes)
    return objective(summary, plain["objective"])


if __name__ == "__main__":
    launch(main, conf=Path(__file__).parent / "conf")
