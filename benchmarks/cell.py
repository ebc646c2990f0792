"""Trains a cell, freezes it, and writes it as a benchmark problem.

    python -m benchmarks.cell --data digits --steps 200 --out digits_200.npz
    python -m benchmarks.cell --data DIR --steps 100 --out cifar_100.npz      # DIR/train/<class>/, DIR/test/<class>/

The file holds the cell's weights (``cell.*``, float32) and ``injection``: what the stem makes of the first test images
(float16). z = cell(z, injection) from z = 0 is the problem.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from deq.data import Batches, ImageData, digits, image_folder
from deq.layer import Implicit
from deq.models import EquilibriumClassifier
from deq.models.classifier import ResidualCell
from deq.solvers import Anderson


def load_cell(path: Path, device: torch.device | str = "cpu") -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor]:
    """The cell, without gradients for its weights, and the injection, (B, C, H, W) float32."""
    arrays = np.load(path)
    weights = {key.removeprefix("cell."): torch.from_numpy(arrays[key]) for key in arrays if key.startswith("cell.")}
    inner, channels = weights["conv1.weight"].shape[:2]
    cell = ResidualCell(channels, inner)
    cell.load_state_dict(weights)
    return cell.to(device).requires_grad_(False), torch.from_numpy(arrays["injection"]).float().to(device)


class Sizes(TypedDict):
    """Of an :class:`EquilibriumClassifier`."""

    channels: int
    inner: int
    pool: int


def load_data(name: str, cache: str) -> tuple[ImageData, Sizes]:
    """``digits``, or a folder of images; with the sizes of the network that suits it."""
    if name == "digits":
        return digits(), {"channels": 24, "inner": 32, "pool": 2}
    return image_folder(name, cache), {"channels": 48, "inner": 64, "pool": 8}


def first_batches(batches: Batches, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """That many training batches, over as many epochs as they take."""
    return itertools.islice((batch for epoch in itertools.count() for batch in batches.train(epoch)), steps)


def train(model: EquilibriumClassifier, batches: Batches, steps: int, learning_rate: float) -> float:
    """Adam at a constant rate; returns the training accuracy of the last tenth of the steps."""
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    hits: list[float] = []
    for images, labels in first_batches(batches, steps):
        logits = model(images)
        optimizer.zero_grad(set_to_none=True)
        functional.cross_entropy(logits, labels).backward()
        optimizer.step()
        hits.append((logits.argmax(dim=1) == labels).float().mean().item())
    last = hits[-max(1, steps // 10) :]
    return sum(last) / len(last)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, or a folder with train/ and test/ in it")
    parser.add_argument("--channels", type=int, help="of the state (48; 24 for digits)")
    parser.add_argument("--inner", type=int, help="between the convolutions (64; 32 for digits)")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=32, help="test images in the problem")
    parser.add_argument("--cache", default="~/.cache/anderson-deq", help="where decoded images are kept")
    parser.add_argument("--out", type=Path, required=True, help="the .npz file to write")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    data, sizes = load_data(options.data, options.cache)
    sizes["channels"] = options.channels or sizes["channels"]
    sizes["inner"] = options.inner or sizes["inner"]
    batches = Batches(data, options.batch, options.seed)
    solver = Anderson(window=5, tol=1e-2, max_iter=30, stop="mean")
    model = EquilibriumClassifier(
        data.channels,
        data.size,
        len(data.classes),
        solver=solver,
        gradient=Implicit(solver),
        **sizes,
    )
    accuracy = train(model, batches, options.steps, options.lr)
    model.eval()
    images, _ = next(Batches(data, options.images, options.seed).test())
    with torch.no_grad():
        injection = model.inject(images)
    cell = model.deq.cell
    assert isinstance(cell, ResidualCell)
    arrays: dict[str, Any] = {f"cell.{name}": value.numpy() for name, value in cell.state_dict().items()}
    np.savez(options.out, injection=injection.half().numpy(), **arrays)
    print(f"{options.steps} steps, training accuracy {accuracy:.1%}, written to {options.out}")


if __name__ == "__main__":
    main()
