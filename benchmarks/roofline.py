"""The Anderson update against what the machine can do: a roofline, and time against the window.

    python -m benchmarks.roofline --batch 100 --dim 49152 --out benchmarks/results

The roof has two sides, both measured in the same run: the bandwidth of a copy, and the rate of a large matrix product.
An update of window m makes 4m + 2 operations an element (residual, m products of the Gram row, ||f||^2, mix) and moves
at least 2m + 4 elements; every other way of computing it is drawn at that same intensity, since what it does beyond
it is not useful work. Medians over rounds taken in turns.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.peers import installed
from benchmarks.record import RESULTS, default_device, device_name, folder_of, seconds, show_and_save
from benchmarks.update import Elementwise, copy_of, eager_update, seconds_repeated
from deq.kernels import AndersonWindow

WINDOWS = (2, 3, 5, 8, 10, 16)  # TorchDEQ has no window of 1
OURS, FLOOR = "AndersonWindow.step", "copy floor"
TORCHDEQ = "TorchDEQ anderson_solver"
Measure = Callable[[], float]


def operations(window: int) -> int:
    """Floating-point operations an element: g, m products, ||f||^2, mix of m rows."""
    return 1 + 2 * window + 2 + 2 * window - 1


def units(window: int) -> int:
    """Elements moved an element of the state."""
    return 2 * window + 4


def measures(window: int, batch: int, dim: int, device: torch.device, iterations: int) -> dict[str, Measure]:
    """What is timed for one window."""
    copy = copy_of((window + 2) * batch * dim, device)
    state = AndersonWindow(batch, dim, window=window, device=device)
    xs = [torch.randn(batch, dim, device=device) for _ in range(3)]
    out = torch.empty_like(xs[0])
    steps = iter(range(10**9))

    def step() -> None:
        k = next(steps)
        state.step(xs[k % 3], xs[(k + 1) % 3], out=out)

    for _ in range(window):
        step()
    X, F = torch.randn(2, batch, window, dim, device=device)
    found: dict[str, Measure] = {
        FLOOR: lambda: seconds_repeated(copy, device),
        OURS: lambda: seconds_repeated(step, device),
        "formula in eager PyTorch": lambda: seconds_repeated(lambda: eager_update(X, F), device),
    }
    for name, solve in installed((TORCHDEQ,)).items():
        f = Elementwise(batch, dim, device, torch.float32)
        z0 = torch.zeros_like(f.shift)

        def repeat_f(f: Elementwise = f, z: torch.Tensor = z0) -> None:
            for _ in range(iterations):
                z = f(z)

        found[name] = lambda solve=solve, f=f, z0=z0: (
            (  # type: ignore[misc]
                seconds(lambda: solve(f, z0, 0.0, iterations, window), device) - seconds(repeat_f, device)
            )
            / iterations
        )
    return found


def peak(device: torch.device) -> float:
    """Operations a second of a float32 matrix product."""
    n = 8192 if device.type == "cuda" else 2048
    A, B = torch.randn(2, n, n, device=device)
    return 2 * n**3 / min(seconds_repeated(lambda: A @ B, device) for _ in range(3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--dim", type=int, default=48 * 32 * 32)
    parser.add_argument("--windows", type=int, nargs="+", default=WINDOWS)
    parser.add_argument("--iterations", type=int, default=20, help="of one solve of a peer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--out", type=Path, default=None, help=f"folder for results ({RESULTS.name}/ here)")
    options = parser.parse_args()
    device, elements = torch.device(options.device), options.batch * options.dim
    roof = peak(device)
    medians: dict[int, dict[str, float]] = {}
    rows = []
    for window in options.windows:
        timed = measures(window, options.batch, options.dim, device, options.iterations)
        for measure in timed.values():
            measure()
        taken: dict[str, list[float]] = {name: [] for name in timed}
        for _ in range(options.rounds):
            for name, measure in timed.items():
                taken[name].append(measure())
        medians[window] = {name: statistics.median(times) for name, times in taken.items()}
        for name, times in taken.items():
            over = statistics.median(t / floor for t, floor in zip(times, taken[FLOOR], strict=True))
            median = medians[window][name]
            rows.append(
                [
                    window,
                    name,
                    f"{median * 1e3:.3f}",
                    f"{min(times) * 1e3:.3f} to {max(times) * 1e3:.3f}",
                    f"{units(window) * elements * 4 / median / 1e9:.1f}",
                    "-" if name == FLOOR else f"{operations(window) * elements / median / 1e9:.1f}",
                    f"{over:.2f}",
                ]
            )
    stem = f"roofline-b{options.batch}-d{options.dim}"
    windows = " ".join(map(str, options.windows))
    show_and_save(
        stem,
        f"python -m benchmarks.roofline --batch {options.batch} --dim {options.dim} --windows {windows} "
        f"--iterations {options.iterations} --rounds {options.rounds}",
        f"B = {options.batch}, d = {options.dim}, float32, {options.rounds} rounds, {torch.get_num_threads()} threads; "
        f"a matrix product runs at {roof / 1e9:.0f} GFLOP/s. TorchDEQ: overhead of an iteration in a solve of "
        f"{options.iterations}.",
        ["m", "what", "ms, median", "ms, range", "GB/s at 2m + 4 units", "GFLOP/s", "over floor"],
        rows,
        options.out,
    )
    if options.out is not None:
        draw(medians, elements, roof, folder_of(options.out) / f"{stem}.png")


def draw(medians: dict[int, dict[str, float]], elements: int, roof: float, path: Path) -> None:
    """Left: the roofline. Right: milliseconds against the window."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no picture is drawn: matplotlib is not installed (pip install -e '.[bench]')", file=sys.stderr)
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4))
    bandwidth = statistics.median(units(m) * elements * 4 / times[FLOOR] for m, times in medians.items())
    ridge = roof / bandwidth
    lowest = 0.12
    line = [lowest, ridge, 30 * ridge]
    left.plot(line, [min(bandwidth * i, roof) / 1e9 for i in line], color="0.25", linewidth=1.6)
    left.annotate(
        f"copy: {bandwidth / 1e9:.0f} GB/s",
        (ridge / 6, bandwidth * ridge / 6 / 1e9),
        (6, -12),
        textcoords="offset points",
    )
    left.annotate(
        f"matrix product: {roof / 1e9:.0f} GFLOP/s", (ridge * 1.2, roof / 1e9), (0, 6), textcoords="offset points"
    )
    names = [name for name in next(iter(medians.values())) if name != FLOOR]
    for name in names:
        mine = name == OURS
        style = {"zorder": 3 if mine else 2, "markersize": 7 if mine else 5, "alpha": 1.0 if mine else 0.85}
        left.plot(
            [operations(m) / (4 * units(m)) for m in medians],
            [operations(m) * elements / times[name] / 1e9 for m, times in medians.items()],
            "o" if mine else "s",
            label=name,
            **style,
        )
        right.plot(
            list(medians), [t[name] * 1e3 for t in medians.values()], "o-" if mine else "s-", label=name, **style
        )
    right.plot(
        list(medians), [t[FLOOR] * 1e3 for t in medians.values()], "--", color="0.25", label="copy floor, 2m + 4 units"
    )
    left.set(
        xscale="log",
        yscale="log",
        xlabel="operations a byte of the least traffic",
        ylabel="useful GFLOP/s",
        title=f"Anderson update, m = {min(medians)} to {max(medians)}",
    )
    left.set_ylim(top=2.5 * roof / 1e9)
    right.set(xlabel="window m", ylabel="ms an update", title="Time against the window", yscale="log")
    right.legend(frameon=False, fontsize=9)
    for panel in (left, right):
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25, which="major")
    figure.suptitle(f"{device_name()}, {elements:,} elements of state, float32", fontsize=10, color="0.3")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"drawn to {path}")


if __name__ == "__main__":
    main()
