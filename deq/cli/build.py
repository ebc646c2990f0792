"""The parts that a config describes, built and tried before any work."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from deq.cli.mistakes import cannot_take
from deq.layer import DEQ, Gradient, StabilityLosses
from deq.models import EquilibriumModel
from deq.models.tutorial import TutorialDEQ, TutorialSolver
from deq.records.errors import UserError, first_line, in_yaml, values_of_the_user
from deq.solvers import Solver


def try_solvers(solvers: Mapping[str, Any], device: torch.device) -> None:
    """Start every solver, by its node's name, on one number on ``device``.

    Raises:
        UserError: its backend does not run there.
    """
    for node, solver in solvers.items():
        if not isinstance(solver, Solver):
            raise UserError(f"gradient.solver cannot be {in_yaml(solver)}; leave it out, and give adjoint.KNOB=VALUE")
        if isinstance(solver, TutorialSolver):
            continue  # plain PyTorch, on any device
        try:
            solver.start(torch.zeros(1, 1, device=device))
        except ValueError as error:  # it begins with the option's name
            raise UserError(f"{node}.{error}") from error


def try_optimizer(make: Callable[..., Any]) -> None:
    """Make the optimizer for one number.

    Raises:
        UserError: it takes no such knob, or not that value.
    """
    try:
        make([torch.zeros(1, requires_grad=True)])
    except (TypeError, ValueError, RuntimeError) as error:  # of torch, which has no words for a knob
        raise UserError(
            f"optim.optimizer cannot be made ({first_line(error)}); mend optim.lr, optim.weight_decay or what the "
            "command line gives it with +"
        ) from error


def build(config: DictConfig, node: str, kind: type[Any]) -> Any:
    """What a node of the config describes.

    Raises:
        UserError: a ``_target_`` of the user's makes something else.
    """
    made = instantiate(config[node])
    if not isinstance(made, kind):
        raise UserError(
            f"{node}._target_ must make {_article(kind)}, got {_article(type(made))}; leave it out for the default"
        )
    return made


def _article(kind: type) -> str:
    return f"{'an' if kind.__name__[0] in 'AEIOU' else 'a'} {kind.__name__}"


def build_model(config: DictConfig, *, solver: Solver, gradient: Gradient, **sizes: int) -> EquilibriumModel:
    """What ``model`` describes. sizes: of the data, as ``__init__`` of the model names them.

    Raises:
        UserError: a value that it does not take, a ``_target_`` of the user's that makes something else, or a model
            that does not train as the command line says.
    """
    try:
        with values_of_the_user():
            made = instantiate(config.model)(solver=solver, gradient=gradient, **sizes)
    except TypeError as error:
        raise UserError(cannot_take("model", error)) from error
    if not isinstance(made, EquilibriumModel):
        raise UserError(
            f"model._target_ must make an EquilibriumModel, got {_article(type(made))}; leave it out for the default"
        )
    _hold_to_the_command_line(made, config, solver, gradient)
    return made


def _hold_to_the_command_line(model: EquilibriumModel, config: DictConfig, solver: Solver, gradient: Gradient) -> None:
    """Raises UserError for a model whose parts are not those that the command line asks for, or no parts of it."""
    kind = type(model).__name__
    for part, wanted, fix in (
        ("deq", DEQ, "make self.deq = DEQ(cell, solver=solver, gradient=gradient) in its __init__"),
        ("head", torch.nn.Module, "make self.head, a module from z* to logits, in its __init__"),
    ):
        there = getattr(model, part, None)
        if not isinstance(there, wanted):
            lacks = f"{kind} has no {part}" if there is None else f"{kind}.{part} is {_article(type(there))}"
            raise UserError(f"{lacks}: {fix}")
    layer = model.deq
    if not isinstance(layer.cell, torch.nn.Module):
        raise UserError(f"the cell of {kind} must be a torch.nn.Module, got {_article(type(layer.cell))}")
    for name, asked, has in (("solver", solver, layer.solver), ("gradient", gradient, layer.gradient)):
        if asked != has:
            raise UserError(
                f"{kind} has another {name} ({type(has).__name__}) than the command line asks for "
                f"({type(asked).__name__}): make its layer with DEQ(cell, solver=solver, gradient=gradient)"
            )
    if isinstance(solver, TutorialSolver) and not isinstance(layer, TutorialDEQ):
        raise UserError(
            f"{type(solver).__name__} brings the tutorial's layer along, which {kind} does not have: use "
            "solver=forward or anderson"
        )
    if config.cuda_graph and not layer.cuda_graph:
        raise UserError(
            f"cuda_graph=true does not reach the layer of {kind}: write cuda_graph: ${{cuda_graph}} into its YAML, and "
            "give it to DEQ"
        )


def pick_device(name: Any) -> torch.device:
    """``auto``: the first CUDA (or ROCm) device, else the CPU; anything else as torch writes devices.

    Raises:
        UserError: no such device here.
    """
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda", 0) if cuda else torch.device("cpu")
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", str(name))
    if not match:
        raise UserError(f"device must be auto, cpu, cuda or cuda:N, got {in_yaml(name)}")
    if name == "cpu":
        return torch.device("cpu")
    number = int(match.group(1) or 0)
    if number >= cuda:
        has = f"{cuda} CUDA device{'s' if cuda != 1 else ''}" if cuda else "no CUDA device"
        raise UserError(f"device={name}: torch sees {has} here; use device=auto or device=cpu")
    return torch.device("cuda", number)


def refuse_corrections_out_of_reach(stability: StabilityLosses | None, solver: Solver, cuda_graph: bool) -> None:
    """
    Raises:
        UserError: a solve never has the iterates that are to be corrected.
    """
    corrections = stability.corrections if stability is not None else ()
    if corrections and cuda_graph:
        raise UserError("cuda_graph=true keeps no iterates on the way: choose it or stability.corrections")
    if max(corrections, default=0) > solver.max_iter:
        raise UserError(
            f"stability.corrections must be at most max_iter={solver.max_iter}, got {max(corrections)}; name earlier "
            "evaluations or raise max_iter"
        )


def refuse_graphs_without_device(cuda_graph: bool, device: torch.device) -> None:
    """Raises UserError for cuda_graph=true on a CPU."""
    if cuda_graph and device.type != "cuda":
        raise UserError(f"cuda_graph=true needs a CUDA or ROCm device, this run is on {device}: use cuda_graph=false")


def refuse_what_the_tutorial_lacks(config: DictConfig, solvers: Collection[Solver]) -> None:
    """
    Raises:
        UserError: a solver written the way the tutorial writes it, with what only this project's layer can do.
    """
    if any(isinstance(solver, TutorialSolver) for solver in solvers):
        for knob, asked in (
            ("cuda_graph", config.cuda_graph),
            ("warm_start", config.warm_start),
            ("stability.jacobian_weight", config.stability is not None and config.stability.jacobian_weight),
            ("stability.corrections", config.stability is not None and config.stability.corrections),
            (f"precision={config.precision}", config.precision != "fp32"),
            # Its own solvers know no compaction; another one for the adjoint would.
            ("compact", any(solver.compact for solver in solvers)),
        ):
            if asked:
                raise UserError(
                    f"the tutorial's layer knows no {knob}; leave it out, or use solver=forward or anderson"
                )
