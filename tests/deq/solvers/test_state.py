"""States of several tensors: the numbers of one tensor packed by hand, in the structure that the caller chose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from deq import DEQ
from deq.layer import Gradient, Implicit, JacobianFree, Phantom, Unrolled
from deq.solvers import Anderson, Broyden, Forward, Solver
from deq.solvers.state import Packing

TIGHT = Anderson(window=5, tol=1e-13, max_iter=200)
GRADIENTS: list[Gradient] = [Implicit(), JacobianFree(), Phantom(steps=4, damping=0.7), Unrolled(steps=3)]
each_gradient = pytest.mark.parametrize("gradient", GRADIENTS, ids=lambda gradient: type(gradient).__name__.lower())

Scales = dict[str, Tensor]


class TwoScales(nn.Module):
    """Six numbers a sample in a 2 x 3 matrix and four in a vector, each fed to the other: a contraction."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        weight = torch.randn(10, 10, dtype=dtype)
        weight *= 0.6 / torch.linalg.matrix_norm(weight, 2)
        self.high, self.low = nn.Parameter(weight[:, :6].clone()), nn.Parameter(weight[:, 6:].clone())

    def forward(self, z: Scales, x: Tensor) -> Scales:
        state = torch.cat([z["high"].reshape(-1, 6), z["low"]], dim=1)
        high = torch.tanh(state @ self.high + x).reshape(-1, 2, 3)
        # The other order than z's: states are told apart by name.
        return {"low": torch.tanh(state @ self.low + x[:, :4]), "high": high}


def zeros(batch: int, dtype: torch.dtype = torch.float64) -> Scales:
    return {"high": torch.zeros(batch, 2, 3, dtype=dtype), "low": torch.zeros(batch, 4, dtype=dtype)}


def by_hand(cell: Callable[[Scales, Tensor], Scales]) -> Callable[[Tensor, Tensor], Tensor]:
    """The same map on one tensor, (B, 10)."""

    def packed(z: Tensor, x: Tensor) -> Tensor:
        high, low = z.split([6, 4], dim=1)
        result = cell({"high": high.view(-1, 2, 3), "low": low}, x)
        return torch.cat([result["high"].flatten(1), result["low"]], dim=1)

    return packed


def joined(z: Scales) -> Tensor:
    return torch.cat([z["high"].flatten(1), z["low"]], dim=1)


@pytest.mark.parametrize(
    "solver",
    [Anderson(tol=1e-8), Anderson(tol=1e-8, beta=0.5, stop="mean"), Forward(tol=1e-8), Broyden(tol=1e-8)],
    ids=["anderson", "anderson, mean", "forward", "broyden"],
)
def test_a_solve_is_that_of_the_state_packed_by_hand_to_the_bit(solver: Solver) -> None:
    cell, x = TwoScales(), torch.randn(5, 6, dtype=torch.float64)
    start = torch.randn(5, 10, dtype=torch.float64)
    z0 = {"high": start[:, :6].reshape(5, 2, 3), "low": start[:, 6:]}
    nested = solver.solve(lambda z: cell(z, x), z0, trace=True)
    packed = solver.solve(lambda z: by_hand(cell)(z, x), start, trace=True)
    assert list(nested.z) == ["high", "low"]
    assert torch.equal(joined(nested.z), packed.z)
    assert packed.evaluations < solver.max_iter
    for name in ("residual", "iterations", "converged", "trace"):
        assert torch.equal(getattr(nested, name), getattr(packed, name))
    assert (nested.evaluations, nested.sample_evaluations) == (packed.evaluations, packed.sample_evaluations)
    assert "z {'high': (5, 2, 3), 'low': (5, 4)} torch.float64)" in repr(nested)


@each_gradient
@pytest.mark.parametrize("compact", [False, True], ids=["all samples", "compacting"])
def test_a_layer_is_that_of_the_state_packed_by_hand_to_the_bit(gradient: Gradient, compact: bool) -> None:
    cell = TwoScales()
    solver = Anderson(window=3, tol=1e-9, max_iter=100, compact=compact)
    # Saturated samples are done at once, small ones take long.
    inputs = torch.randn(8, 6, dtype=torch.float64) * torch.logspace(1, -2, 8, dtype=torch.float64)[:, None]
    coefficients = torch.linspace(-1, 1, 80, dtype=torch.float64).view(8, 10)
    results = []
    for nested in (True, False):
        x = inputs.clone().requires_grad_()
        cell.zero_grad()
        layer = DEQ(cell if nested else by_hand(cell), solver=solver, gradient=gradient)
        out = layer(x, z0=zeros(8) if nested else joined(zeros(8)))
        flat = joined(out) if nested else out
        (flat * coefficients).sum().backward()
        assert layer.last_solution is not None
        accounts = [layer.last_solution] + ([layer.last_adjoint] if layer.last_adjoint is not None else [])
        solutions = [joined(account.z) if nested else account.z for account in accounts]
        assert torch.equal(solutions[0], flat)
        assert len(accounts) == 1 + isinstance(gradient, Implicit)
        counts = torch.tensor([account.sample_evaluations for account in accounts])
        results.append([flat, x.grad, cell.high.grad, cell.low.grad, *solutions, counts])
    for got, expected in zip(*results, strict=True):
        assert got is not None
        assert torch.equal(got, expected)


class WithoutZ(TwoScales):
    def forward(self, z: Scales, x: Tensor) -> Scales:
        return super().forward({key: torch.zeros_like(value) for key, value in z.items()}, torch.sin(x))


@pytest.mark.parametrize(
    ("gradient", "cell"),
    # The others are the implicit gradient in the limit of many steps, or, Jacobian-free, where f does not depend on z.
    [(Implicit(), TwoScales), (Phantom(120, 0.8), TwoScales), (Unrolled(80), TwoScales), (JacobianFree(), WithoutZ)],
    ids=lambda value: type(value).__name__ if isinstance(value, Gradient) else None,
)
def test_gradcheck_reaches_every_tensor_of_the_state(gradient: Gradient, cell: type[TwoScales]) -> None:
    layer = DEQ(cell(), solver=TIGHT, gradient=gradient)
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    weights = [parameter.detach().clone().requires_grad_() for parameter in layer.cell.parameters()]  # type: ignore[union-attr]

    def f(x: Tensor, high: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
        parameters = {"cell.high": high, "cell.low": low}
        z = torch.func.functional_call(layer, parameters, (x, zeros(2)))
        return z["high"], z["low"]

    assert gradcheck(f, (x, *weights), eps=1e-6, atol=1e-6, fast_mode=True)


@each_gradient
def test_a_loss_on_one_tensor_alone_passes_through_the_others(gradient: Gradient) -> None:
    cell = TwoScales()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    for one in ("high", "low"):
        layer = DEQ(cell, solver=TIGHT, gradient=gradient)
        got = torch.autograd.grad(layer(x, z0=zeros(3))[one].sum(), x)
        packed = DEQ(by_hand(cell), solver=TIGHT, gradient=gradient)(x, z0=joined(zeros(3)))
        part = packed[:, :6] if one == "high" else packed[:, 6:]
        assert torch.equal(got[0], torch.autograd.grad(part.sum(), x)[0])


class Pair(NamedTuple):
    fine: Tensor
    coarse: list[Tensor]


def halved(part: Any, x: Tensor) -> Any:
    """z/2 + x's mean, whatever the structure."""
    if isinstance(part, Tensor):
        return 0.5 * part + x.mean(dim=1).view(-1, *(1,) * (part.ndim - 1))
    if isinstance(part, dict):
        return {key: halved(inner, x) for key, inner in part.items()}
    items = [halved(inner, x) for inner in part]
    return Pair(*items) if isinstance(part, Pair) else type(part)(items)


@pytest.mark.parametrize(
    "z0",
    [
        {"a": torch.zeros(3, 2), 7: torch.zeros(3, 4, 2)},
        (torch.zeros(3, 2), (torch.zeros(3), [torch.zeros(3, 1, 2, 2)])),
        Pair(torch.zeros(3, 5), [torch.zeros(3, 2)]),
        [torch.zeros(3, 2)],
        {"deep": ({"er": (torch.zeros(3, 2), Pair(torch.zeros(3), [torch.zeros(3, 2)]))},)},
    ],
    ids=["dict", "nested tuple", "named tuple", "one in a list", "deep"],
)
def test_the_state_keeps_its_structure(z0: Any) -> None:
    def same(a: Any, b: Any) -> None:
        assert type(a) is type(b)
        if isinstance(a, Tensor):
            assert a.shape == b.shape
            torch.testing.assert_close(a, b)
        elif isinstance(a, dict):
            assert list(a) == list(b)
            for key in a:
                same(a[key], b[key])
        else:
            assert len(a) == len(b)
            for one, other in zip(a, b, strict=True):
                same(one, other)

    x = torch.randn(3, 6)
    fixed_point = halved(halved(z0, 4 * x), torch.zeros_like(x))  # 2 mean(x)
    seen: list[Any] = []

    def cell(z: Any, x: Tensor) -> Any:
        seen.append(z)
        return halved(z, x)

    layer = DEQ(cell, solver=Anderson(tol=1e-6))
    out = layer(x, z0=z0)
    same(out, fixed_point)
    same(halved(seen[-1], x), out)
    assert layer.last_solution is not None
    same(layer.last_solution.z, out)


def test_the_cell_is_given_views_of_the_solvers_iterate_and_no_copies() -> None:
    cell, x = TwoScales(), torch.randn(3, 6, dtype=torch.float64)
    seen: list[tuple[int, int, int, tuple[int, ...], tuple[int, ...]]] = []

    def f(z: Scales) -> Scales:
        storage = z["high"].untyped_storage()
        assert storage.nbytes() == 3 * 10 * 8
        seen.append(
            (storage.data_ptr(), z["high"].data_ptr(), z["low"].data_ptr(), z["high"].stride(), z["low"].stride())
        )
        return cell(z, x)

    solution = Anderson(tol=1e-8).solve(f, zeros(3))
    assert solution.evaluations == len(seen) > 5
    base = seen[0][0]
    # The iterate is updated in place: the same memory in every evaluation.
    assert set(seen) == {(base, base, base + 6 * 8, (10, 3, 1), (10, 1))}
    assert solution.z["high"].untyped_storage().data_ptr() == solution.z["low"].untyped_storage().data_ptr()


class Written(TorchDispatchMode):
    """The operations that make or fill a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.is_view is False:
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_what_the_cell_returns_is_written_once_whatever_its_strides_and_dtype() -> None:
    state = (torch.zeros(2, 3, 4, 4), torch.zeros(2, 5))
    packing = Packing(state)
    last = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    row = torch.randn(5, 2, dtype=torch.bfloat16).T
    with Written() as mode:
        flat = packing.pack((last, row), cast=True)
    assert mode.names == ["aten::empty", "aten::copy_", "aten::copy_"]
    assert torch.equal(flat, torch.cat([last.flatten(1), row.float()], dim=1))
    assert flat.is_contiguous()


def test_the_backward_pass_fills_one_buffer_and_not_one_for_each_tensor() -> None:
    packing = Packing(tuple(torch.zeros(2, 3) for _ in range(4)))
    flat = torch.randn(2, 12, requires_grad=True)
    parts = packing.unpack(flat)
    with Written() as mode:
        (grad,) = torch.autograd.grad(list(parts), flat, [torch.full((2, 3), i) * 1.0 for i in range(4)])
    assert [name for name in mode.names if "zeros" in name or "slice" in name] == []
    assert mode.names.count("aten::cat") == 1
    assert torch.equal(grad, torch.arange(4.0).repeat_interleave(3).expand(2, 12))


def test_the_outputs_may_be_modified_in_place_and_the_account_stays() -> None:
    layer = DEQ(TwoScales(), solver=TIGHT)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    out = layer(x, z0=zeros(3))
    assert layer.last_solution is not None
    kept = {key: value.clone() for key, value in layer.last_solution.z.items()}
    expected = torch.autograd.grad(sum(v.relu().sum() for v in layer(x, z0=zeros(3)).values()), x)
    got = torch.autograd.grad(sum(v.relu_().sum() for v in out.values()), x)
    assert torch.equal(got[0], expected[0])
    assert all(torch.equal(layer.last_solution.z[key], kept[key]) for key in kept)


def test_an_account_that_is_written_to_before_the_backward_pass_is_noticed() -> None:
    layer = DEQ(TwoScales(), solver=TIGHT)
    out = layer(torch.randn(3, 6, dtype=torch.float64), z0=zeros(3))
    assert layer.last_solution is not None
    layer.last_solution.z["low"].zero_()  # f was recorded there
    with pytest.raises(RuntimeError, match="modified inplace"):
        joined(out).sum().backward()


def test_z0_is_not_modified_and_a_warm_start_stops_at_once() -> None:
    layer = DEQ(TwoScales(), solver=Anderson(tol=1e-6))
    x, start = torch.randn(3, 6, dtype=torch.float64), zeros(3)
    first = layer(x, z0=start)
    assert not any(value.any() for value in start.values())
    again = layer(x, z0={key: value.detach() for key, value in first.items()})
    assert layer.last_solution is not None
    assert layer.last_solution.evaluations == 1
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_a_value_that_is_not_finite_in_one_tensor_gives_up_that_sample_alone() -> None:
    cell, x = TwoScales(), torch.randn(4, 6, dtype=torch.float64)
    bad = x.clone()
    bad[1, 5] = torch.nan  # of "high" alone
    got, expected = (Anderson(tol=1e-8).solve(lambda z, x=x: cell(z, x), zeros(4)) for x in (bad, x))
    others = [0, 2, 3]
    assert not got.converged[1]
    assert torch.equal(joined(got.z)[others], joined(expected.z)[others])


def test_under_autocast_the_state_stays_float32_and_gradients_are_float32s_but_for_rounding() -> None:
    cell = TwoScales(torch.float32)
    layer = DEQ(cell, solver=Anderson(tol=5e-3, max_iter=30))
    x = torch.randn(16, 6)
    grads = []
    for enabled in (False, True):
        cell.zero_grad()
        z0 = {key: value.to(torch.bfloat16 if enabled else torch.float32) for key, value in zeros(16).items()}
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            # In half precision from end to end, so that what the cell returns is.
            out = layer(x.to(z0["low"].dtype), z0=z0)
        assert {value.dtype for value in out.values()} == {torch.float32}
        joined(out).pow(2).sum().backward()
        grads.append(torch.cat([parameter.grad for parameter in cell.parameters()], dim=1))  # type: ignore[misc]
    assert not torch.equal(*grads)
    assert (grads[0] - grads[1]).norm() < 0.05 * grads[0].norm()


def changed(**parts: Any) -> Callable[[Scales], Any]:
    return lambda z: {key: value for key, value in {**z, **parts}.items() if value is not None}


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (
            changed(low=None),
            r"f\(z\) must be a dict with the keys \['high', 'low'\] of the state, got a dict .*\['high'\]",
        ),
        (changed(more=torch.zeros(2, 1)), r"keys \['high', 'low'\] of the state, got a dict .*'more'\]"),
        (lambda z: (z["high"], z["low"]), r"f\(z\) must be a dict with the keys .* of the state, got a tuple of 2"),
        (lambda z: z["low"], r"f\(z\) must be a dict with the keys .* of the state, got a tensor, \(2, 4\)"),
        (changed(low=[torch.zeros(2, 4)]), r"f\(z\)\['low'\] must be a tensor as in the state, got a list of 1"),
        (
            changed(low=torch.zeros(2, 5)),
            r"f\(z\)\['low'\] must be \(2, 4\) torch.float32 on cpu .* it is \(2, 5\) .* on cpu: return what",
        ),
        (changed(low=torch.zeros(1, 4)), r"f\(z\)\['low'\] must be \(2, 4\) .* it is \(1, 4\)"),
        (changed(high=torch.zeros(2, 6)), r"f\(z\)\['high'\] must be \(2, 2, 3\) .* it is \(2, 6\)"),
        (changed(high=torch.zeros(2, 2, 3).double()), r"f\(z\)\['high'\] must be .* torch.float32 .* torch.float64"),
        (changed(high=torch.zeros(2, 2, 3, device="meta")), r"f\(z\)\['high'\] must be .* on cpu .* on meta"),
    ],
)
def test_a_map_that_returns_something_else_is_told_which_tensor_what_and_the_fix(
    f: Callable[[Scales], Any], message: str
) -> None:
    z0 = zeros(2, torch.float32)
    with pytest.raises(ValueError, match=message):
        Anderson().solve(f, z0)
    with pytest.raises(ValueError, match=message):
        DEQ(lambda z, x: f(z))(torch.zeros(2, 6), z0=z0)


def test_a_sequence_of_another_length_is_named() -> None:
    with pytest.raises(ValueError, match=r"f\(z\)\[1\] must be a tuple of 2 as in the state, got a list of 1"):
        Forward().solve(lambda z: (z[0], [z[1][0]]), (torch.zeros(2, 3), (torch.zeros(2), torch.zeros(2))))


@pytest.mark.parametrize(
    ("z0", "message"),
    [
        ({}, r"z0 must hold at least one tensor, got \{\}"),
        (((), []), r"z0 must hold at least one tensor, got \(\(\), \[\]\)"),
        (
            {"a": torch.zeros(2, 3), "b": torch.zeros(3, 3)},
            r"z0\['b'\] has 3 samples, but the first tensor of z0 has 2: give all of them the same first dimension",
        ),
        (
            (torch.zeros(2), [torch.zeros(2).double()]),
            r"z0\[1\]\[0\] has torch.float64 for a dtype, but .* torch.float32: give all of them one dtype",
        ),
        ((torch.zeros(2), torch.zeros(2, device="meta")), r"z0\[1\] has meta for a device, but .* cpu: .* one device"),
        ([torch.tensor(1.0)], r"z0\[0\] must be \(B, ...\), got a tensor without dimensions"),
        ({"a": None}, r"z0\['a'\] must be a tensor, or a tuple, list or dict of tensors, got NoneType"),
        ((torch.zeros(2), 3.0), r"z0\[1\] must be a tensor, .* got float"),
        ({"a": torch.zeros(0, 3)}, r"z0 must be .* at least one element, got \(0, 3\)"),
        ([torch.zeros(2, 3, dtype=torch.int64)], r"z0 must be .* floating point .* torch.int64"),
    ],
)
def test_a_start_that_is_no_state_is_named(z0: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Anderson().solve(lambda z: z, z0)
    with pytest.raises(ValueError, match=message):
        DEQ(lambda z, x: z)(torch.zeros(2, 3), z0=z0)


def test_a_map_that_writes_into_its_argument_is_refused() -> None:
    def f(z: Scales) -> Scales:
        z["low"].mul_(0.5)
        return z

    with pytest.raises(ValueError, match="f wrote into its argument"):
        Forward().solve(f, zeros(2))


class TwoResolutions(nn.Module):
    """A small multi-scale cell: a residual block a resolution, then each is fused with the other.

    Source: Bai, Koltun & Kolter 2020, *Multiscale deep equilibrium models*.
    """

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.block = nn.ModuleDict({scale: nn.Conv2d(channels, channels, 3, padding=1) for scale in ("high", "low")})
        self.norm = nn.ModuleDict({scale: nn.GroupNorm(2, channels) for scale in ("high", "low")})
        self.down, self.up = nn.Conv2d(channels, channels, 3, stride=2, padding=1), nn.Conv2d(channels, channels, 1)
        self.to(torch.float64)
        for convolution in (*self.block.values(), self.down, self.up):
            nn.init.normal_(convolution.weight, std=0.05)  # type: ignore[arg-type]

    def forward(self, z: Scales, x: Scales) -> Scales:
        inner = {scale: functional.relu(x[scale] + self.block[scale](z[scale])) for scale in z}
        fused = {
            "high": inner["high"] + functional.interpolate(self.up(inner["low"]), scale_factor=2.0),
            "low": inner["low"] + self.down(inner["high"]),
        }
        return {scale: self.norm[scale](fused[scale]) for scale in z}


def test_a_multi_scale_cell_with_an_injection_a_scale_has_the_gradients_of_200_steps() -> None:
    cell = TwoResolutions()
    layer = DEQ(cell, solver=Anderson(tol=1e-12, max_iter=200))
    image = torch.randn(2, 4, 8, 8, dtype=torch.float64, requires_grad=True)

    def loss(z: Scales) -> Tensor:
        return z["high"].cos().mean() + z["low"].sin().mean()

    def injected() -> Scales:
        return {"high": image, "low": functional.avg_pool2d(image, 2)}

    z_star = layer(injected())  # the start is zeros in the structure of x
    assert {scale: tuple(z.shape) for scale, z in z_star.items()} == {"high": (2, 4, 8, 8), "low": (2, 4, 4, 4)}
    assert layer.last_solution is not None
    assert layer.last_solution.converged.all()
    wanted = [image, *cell.parameters()]
    got = torch.autograd.grad(loss(z_star), wanted)
    x = injected()
    z = {scale: torch.zeros_like(value) for scale, value in x.items()}
    for _ in range(200):
        z = cell(z, x)
    for name, one, other in zip(
        ["x", *dict(cell.named_parameters())], got, torch.autograd.grad(loss(z), wanted), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9, msg=name)
        assert one.any(), name


def test_a_nested_injection_is_restricted_to_the_samples_that_move() -> None:
    cell = TwoResolutions()
    x = torch.randn(6, 4, 8, 8, dtype=torch.float64)
    results = []
    for compact in (False, True):
        solver = Anderson(tol=1e-8, max_iter=100, compact=compact)
        layer = DEQ(cell, solver=solver)
        cell.zero_grad()
        # One sample starts at its fixed point's neighbour in x: it is done before the others.
        start = DEQ(cell, solver=TIGHT)({"high": x[:3], "low": x[:3, :, ::2, ::2]})
        z0 = {scale: torch.cat([z.detach(), torch.zeros_like(z)]) for scale, z in start.items()}
        out = layer({"high": x, "low": x[:, :, ::2, ::2]}, z0=z0)
        (out["high"].pow(2).sum() + out["low"].sum()).backward()
        assert layer.last_solution is not None
        results.append((out, [parameter.grad for parameter in cell.parameters()], layer.last_solution))
    plain, compacted = results
    assert compacted[2].sample_evaluations < plain[2].sample_evaluations
    torch.testing.assert_close(compacted[0], plain[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(compacted[1], plain[1], rtol=1e-5, atol=1e-7)


def test_inputs_that_are_no_nest_of_tensors_are_named() -> None:
    with pytest.raises(ValueError, match=r"x\['low'\] must be a tensor, or a tuple, list or dict of tensors, got int"):
        DEQ(lambda z, x: z)({"high": torch.zeros(2, 3), "low": 4})
