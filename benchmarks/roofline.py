"""The Anderson update against what the machine can do: a roofline, and time against the window.

    python -m benchmarks.roofline --batch 100 --dim 49152 --out benchmarks/results

The roof has two sides, both measured in the same run: the bandwidth of a copy, and the rate of a large matrix product.
An update of window m makes 4m + 2 operations an element (residual, m products of the Gram row, ||f||^2, mix) and moves
at least 2m + 4 elements; every other way of computing it is drawn at that same intensity, since what it does beyond
it is not useful work. Medians over rounds taken in turns.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import altair as alt
import torch

from benchmarks.peers import installed
from benchmarks.record import RESULTS, default_device, device_name, folder_of, seconds, show_and_save
from benchmarks.update import Elementwise, copy_of, eager_update, seconds_repeated
from deq.kernels import AndersonWindow
from deq.report.figures import style

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
    bandwidth = statistics.median(units(m) * elements * 4 / times[FLOOR] for m, times in medians.items())
    ridge, left, right = roof / bandwidth, 0.12, 30 * roof / bandwidth
    names = [name for name in next(iter(medians.values())) if name != FLOOR]
    looks = {
        name: style.Look(name, colour, width=2.6 if name == OURS else 1.4)
        for name, colour in zip(names, style.PALETTE, strict=False)
    }
    floor = style.Look("copy floor, 2m + 4 units", style.BASELINE, (7, 4))
    entries = [*looks.values(), floor]
    rates: list[style.Row] = [
        {
            "name": name,
            "entry": name,
            "x": operations(m) / (4 * units(m)),
            "y": operations(m) * elements / times[name] / 1e9,
        }
        for name in names
        for m, times in medians.items()
    ]
    roofs = style.chart([{"x": x, "y": min(bandwidth * x, roof) / 1e9} for x in (left, ridge, right)])
    copy = {"x": ridge / 6, "y": bandwidth * ridge / 6 / 1e9, "text": f"copy: {bandwidth / 1e9:.0f} GB/s"}
    product = {"x": right, "y": roof / 1e9, "text": f"matrix product: {roof / 1e9:.0f} GFLOP/s"}
    lowest = min(*(row["y"] for row in rates), bandwidth * left / 1e9)
    x = style.logarithmic(alt.X, "operations a byte of the least traffic", left, right)
    roofline = [
        roofs.mark_line(color=style.INK, strokeWidth=1.6).encode(alt.X("x:Q"), alt.Y("y:Q")),
        *style.curves(
            rates, entries, x, style.logarithmic(alt.Y, "useful GFLOP/s", 0.8 * lowest, 2.5 * roof / 1e9), points=True
        ),
        *style.words(copy, align="left", baseline="top", dx=8, dy=2),
        *style.words(product, align="right", baseline="bottom", dy=-6),
    ]
    times: list[style.Row] = [
        {"name": name, "entry": looks[name].entry if name in looks else floor.entry, "x": m, "y": 1e3 * taken}
        for m, all_of_them in medians.items()
        for name, taken in all_of_them.items()
    ]
    longest = [row["y"] for row in times]
    y = style.logarithmic(alt.Y, "ms an update", 0.8 * min(longest), 1.2 * max(longest))
    against = style.curves(
        times, entries, style.linear(alt.X, "window m", whole=True, domain=[min(medians), max(medians)]), y, points=True
    )
    panels = [
        style.panel(roofline, f"m = {min(medians)} to {max(medians)}"),
        style.panel(against, "time against the window"),
    ]
    caption = f"{device_name()}, {elements:,} elements of state, float32; medians."
    style.Figure(path.stem, "Anderson update against the machine", caption, panels, entries).save(path)
    print(f"drawn to {path}")


if __name__ == "__main__":
    main()
