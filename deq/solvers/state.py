"""States of several tensors: a nest of them lies in one flat buffer, which is all that a solver sees."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from deq.kernels.window import is_real

from .map import validate_start, validate_value

if TYPE_CHECKING:
    from .solution import Solution

Nest: TypeAlias = "Tensor | Sequence[Nest] | Mapping[Any, Nest]"
"""A tensor, or a tuple, named tuple, list or dict of nests."""

Skeleton: TypeAlias = Any
"""A nest with the numbers of its tensors, 0, 1, ..., in their place."""


def flatten(nest: Nest, name: str) -> tuple[list[Tensor], Skeleton]:
    """The tensors of a nest in order, and what :func:`unflatten` needs to put others in their place.

    Raises:
        ValueError: if there is none, or something that is neither a tensor nor a nest; begins with ``name``.
    """
    leaves: list[Tensor] = []

    def walk(part: Nest, name: str) -> Skeleton:
        if isinstance(part, Tensor):
            leaves.append(part)
            return len(leaves) - 1
        if isinstance(part, Mapping):
            return {key: walk(inner, f"{name}[{key!r}]") for key, inner in part.items()}
        if isinstance(part, tuple | list):
            return _like(part, [walk(inner, f"{name}[{i}]") for i, inner in enumerate(part)])
        raise ValueError(f"{name} must be a tensor, or a tuple, list or dict of tensors, got {_kind(part)}")

    skeleton = walk(nest, name)
    if not leaves:
        raise ValueError(f"{name} must hold at least one tensor, got {nest!r}")
    return leaves, skeleton


def unflatten(skeleton: Skeleton, leaves: Sequence[Any]) -> Any:
    """The nest with these in the places of the tensors that :func:`flatten` took out."""
    if isinstance(skeleton, int):
        return leaves[skeleton]
    if isinstance(skeleton, dict):
        return {key: unflatten(inner, leaves) for key, inner in skeleton.items()}
    return _like(skeleton, [unflatten(inner, leaves) for inner in skeleton])


def mapped(nest: Nest, function: Callable[[Tensor], Any]) -> Any:
    """The nest with ``function`` of each of its tensors in their places."""
    leaves, skeleton = flatten(nest, "the nest")
    return unflatten(skeleton, [function(leaf) for leaf in leaves])


def _like(sequence: Any, items: list[Any]) -> Any:
    kind = type(sequence)
    return kind(*items) if hasattr(kind, "_fields") else kind(items)  # a named tuple takes its items one by one


class Packing:
    """Where each tensor of a nest lies in one flat buffer, (B, D): one after the other in each sample's row.

    Args:
        nest: tensors, (B, ...) each, of one batch size, dtype and device; only their shapes are kept.
        name: what error messages call it.

    Raises:
        ValueError: for a nest without tensors, a tensor without dimensions, and tensors that differ in batch size,
            dtype or device.

    Example:
        >>> import torch
        >>> packing = Packing({"high": torch.zeros(2, 4, 3), "low": torch.ones(2, 5)})
        >>> flat = packing.pack({"high": torch.zeros(2, 4, 3), "low": torch.ones(2, 5)})
        >>> flat.shape, {key: tuple(view.shape) for key, view in packing.unpack(flat).items()}
        (torch.Size([2, 17]), {'high': (2, 4, 3), 'low': (2, 5)})
    """

    def __init__(self, nest: Nest, name: str = "z0") -> None:
        leaves, self._skeleton = flatten(nest, name)
        first = leaves[0]
        for path, leaf in self._match(nest, name):
            if leaf.ndim == 0:
                raise ValueError(f"{path} must be (B, ...), got a tensor without dimensions: give each sample a row")
            for what, here, there, fix in (
                ("samples", len(leaf), len(first), "the same first dimension"),
                ("for a dtype", leaf.dtype, first.dtype, "one dtype, with .to(dtype)"),
                ("for a device", leaf.device, first.device, "one device, with .to(device)"),
            ):
                if here != there:
                    raise ValueError(
                        f"{path} has {here} {what}, but the first tensor of {name} has {there}: give all of them {fix}"
                    )
        self.dtype, self.device = first.dtype, first.device
        self._shapes = [leaf.shape[1:] for leaf in leaves]
        self._sizes = [math.prod(shape) for shape in self._shapes]

    def __repr__(self) -> str:
        # All that distinguishes one packing from another: recordings are kept by it.
        return f"Packing({unflatten(self._skeleton, [tuple(shape) for shape in self._shapes])}, {self.dtype})"

    def pack(self, nest: Nest, name: str = "z0", *, samples: int | None = None, cast: bool = False) -> Tensor:
        """(B, D), a copy. Each element is written once, whatever the strides, unless autograd records it.

        Args:
            nest: as the one given to the constructor; other batch sizes, and lists for tuples, are taken too.
            name: what error messages call it.
            samples: B, where it is known; default: the first tensor's.
            cast: take tensors of other dtypes.

        Raises:
            ValueError: for another structure, shape, dtype or device.
        """
        leaves: list[Tensor] = []
        for path, leaf in self._match(nest, name):
            if samples is None:
                samples = len(leaf)
            number = len(leaves)
            expected = (samples, *self._shapes[number])
            if leaf.shape != expected or leaf.device != self.device or not (cast or leaf.dtype == self.dtype):
                raise ValueError(
                    f"{path} must be {expected} {self.dtype} on {self.device} as in the state, but it is "
                    f"{tuple(leaf.shape)} {leaf.dtype} on {leaf.device}: return what the map was given"
                )
            leaves.append(leaf)
        if torch.is_grad_enabled():
            return torch.cat(
                [leaf.to(self.dtype).reshape(len(leaf), size) for leaf, size in zip(leaves, self._sizes, strict=True)],
                dim=1,
            )
        flat = torch.empty(leaves[0].shape[0], sum(self._sizes), dtype=self.dtype, device=self.device)
        for view, leaf in zip(self._views(flat.split(self._sizes, dim=1)), leaves, strict=True):
            view.copy_(leaf)
        return flat

    def unpack(self, flat: Tensor) -> Any:
        """The nest of views into ``flat``, (B, D): no copies, rows D elements apart.

        Autograd knows them for views of one tensor: it refuses to record a write into them.
        """
        # One operation for all, whose backward is one concatenation; slices would fill a buffer of zeros each.
        return unflatten(self._skeleton, self._views(flat.split(self._sizes, dim=1)))

    def release(self, flat: Tensor) -> Any:
        """:meth:`unpack` for a ``flat`` that nobody else reads: the views may be written to, recorded or not.

        Autograd takes them for tensors of their own, so that it would not notice a write into what it has kept of flat.
        """
        return unflatten(self._skeleton, self._views(torch.unsafe_split_with_sizes(flat, self._sizes, dim=1)))

    def _views(self, parts: Sequence[Tensor]) -> list[Tensor]:
        return [part.view(len(part), *shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def _match(self, nest: Nest, name: str) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a nest of this structure in order, with their names."""
        for path, part in matched(nest, self._skeleton, name):
            if not isinstance(part, Tensor):
                raise ValueError(f"{path} must be a tensor as in the state, got {_kind(part)}: return one there")
            yield path, part


def matched(nest: Any, skeleton: Skeleton, name: str) -> Iterator[tuple[str, Any]]:
    """What stands in the places of the tensors in a nest of this structure, in order, with its names."""
    if isinstance(skeleton, int):
        yield name, nest
    elif isinstance(skeleton, dict):
        if not isinstance(nest, Mapping) or nest.keys() != skeleton.keys():
            raise ValueError(f"{name} must be a dict with the keys {[*skeleton]} of the state, got {_kind(nest)}")
        for key, inner in skeleton.items():
            yield from matched(nest[key], inner, f"{name}[{key!r}]")
    else:
        if not isinstance(nest, tuple | list) or len(nest) != len(skeleton):
            kind = f"{type(skeleton).__name__} of {len(skeleton)}"
            raise ValueError(f"{name} must be a {kind} as in the state, got {_kind(nest)}")
        for i, inner in enumerate(skeleton):
            yield from matched(nest[i], inner, f"{name}[{i}]")


class Coordinates:
    """A state as its user writes it, and as solvers see it: one flat tensor, a row for each system to solve.

    ``flat = z / scale``, (B, D), for a nest as :class:`Packing` lays it out; (1, B D) where the samples are one system.
    A tensor that is neither scaled nor coupled is left as it is, (B, ...).

    Args:
        z0: a start: a tensor, (B, ...), or a nest of such; only its shapes are kept.
        coupled: the samples are one system. A single vector always is, unless ``compact`` says that its elements are
            independent samples.
        scale: None, or what :meth:`Solver.solve` takes.

    Raises:
        ValueError: see :meth:`Solver.solve`.

    Example:
        >>> import torch
        >>> z = torch.tensor([[2.0, 10.0], [4.0, 20.0]])
        >>> Coordinates(z, scale=torch.tensor([2.0, 10.0])).pack(z)
        tensor([[1., 1.],
                [2., 2.]])
        >>> Coordinates(z, coupled=True).pack(z).shape
        torch.Size([1, 4])
    """

    def __init__(
        self, z0: Nest, *, coupled: bool = False, scale: Any = None, compact: bool = False, name: str = "z0"
    ) -> None:
        leaves, skeleton = flatten(z0, name)
        self._packing = None if isinstance(skeleton, int) else Packing(z0, name)
        if self._packing is None:
            validate_start(leaves[0])
        self.batch_size, self._shape = len(leaves[0]), leaves[0].shape[1:]
        if coupled and compact:
            raise ValueError(
                "coupled=True makes one system of the batch, of which compact=True cannot leave samples out: use "
                "compact=False"
            )
        self.coupled = coupled or (leaves[0].ndim == 1 and self._packing is None and not compact)
        self._scale = None if scale is None else self._flat_scale(scale, z0)

    def __repr__(self) -> str:
        # All that distinguishes one from another: recordings are kept by it, and a scale is one more tensor in them.
        return f"Coordinates({self._packing or tuple(self._shape)}, coupled={self.coupled}, scale={id(self._scale)})"

    def _flat_scale(self, scale: Any, z0: Nest) -> Tensor:
        """(1, ...) as in the flat state."""
        leaves, skeleton = flatten(z0, "z0")
        sizes = matched(scale, skeleton, "scale")
        rows = []
        for (path, size), leaf in zip(sizes, leaves, strict=True):
            if not (is_real(size) or (isinstance(size, Tensor) and not size.is_complex())):
                raise ValueError(f"{path} must be a number or a tensor above 0, got {_kind(size)}")
            given = torch.as_tensor(size, dtype=leaf.dtype, device=leaf.device).detach()
            try:
                # A single vector has a size for each of its elements.
                row = given.expand(leaf.shape) if leaf.ndim == 1 else given.expand(leaf.shape[1:])[None]
            except RuntimeError:
                raise ValueError(
                    f"{path} must have the shape of one sample's state, {tuple(leaf.shape[1:])}, or one that "
                    f"broadcasts to it, got {tuple(given.shape)}"
                ) from None
            if not bool(((row > 0) & torch.isfinite(row)).all()):
                raise ValueError(
                    f"{path} must be above 0 and finite everywhere in {leaf.dtype}: it is a component's size"
                )
            rows.append(row)
        return rows[0] if self._packing is None else self._packing.pack(unflatten(skeleton, rows))

    def pack(self, nest: Any, name: str = "z0", *, samples: int | None = None, cast: bool = False) -> Tensor:
        """The flat state; see :meth:`Packing.pack`."""
        flat = nest if self._packing is None else self._packing.pack(nest, name, samples=samples, cast=cast)
        flat = flat if self._scale is None else flat / self._scale
        return flat.reshape(1, -1) if self.coupled else flat

    def unpack(self, flat: Tensor) -> Any:
        """The state, as views where it is not scaled."""
        z = self._rows(flat)
        return z if self._packing is None else self._packing.unpack(z)

    def release(self, flat: Tensor) -> Any:
        """:meth:`unpack` for a ``flat`` that nobody else reads; see :meth:`Packing.release`."""
        z = self._rows(flat)
        return z if self._packing is None else self._packing.release(z)

    def _rows(self, flat: Tensor) -> Tensor:
        z = self._with_rows(flat)
        return z if self._scale is None else z * self._scale

    def _with_rows(self, flat: Tensor) -> Tensor:
        if not self.coupled:
            return flat
        return flat.view(self.batch_size, *((-1,) if self._packing is not None else self._shape))

    def flat_map(self, f: Callable[[Any], Any], *, cast: bool = False) -> Callable[[Tensor], Tensor]:
        """f, which maps states, as a map of flat ones; ``cast``: take what it returns in other dtypes."""
        if self._packing is None and not self.coupled and self._scale is None and not cast:
            return f

        def mapped(flat: Tensor) -> Tensor:
            z = self.unpack(flat)
            fz = f(z)
            if self._packing is None:
                if cast and isinstance(fz, Tensor):
                    fz = fz.to(z.dtype)
                return self.pack(validate_value(fz, z.shape, z))
            samples = self.batch_size if self.coupled else len(flat)
            return self.pack(fz, "f(z)", samples=samples, cast=cast)

        return mapped

    def account(self, solution: Solution[Any], *, adjoint: bool = False) -> Solution[Any]:
        """What solvers say of the flat state, said of the user's: one system's account is that of each sample.

        An adjoint's state is a gradient with respect to z, whose components are as much smaller as those are larger.
        """
        states = tuple(self.unpack(state) for state in solution.states)
        flat = solution.z
        if adjoint and self._scale is not None:
            flat = (self._with_rows(flat) / self._scale.square()).view(flat.shape)
        found = replace(solution, z=self.unpack(flat), states=states)
        if not self.coupled:
            return found
        count = self.batch_size

        def each(of_system: Tensor) -> Tensor:
            return of_system.expand(count).clone()

        return replace(
            found,
            residual=each(found.residual),
            iterations=each(found.iterations),
            sample_evaluations=found.sample_evaluations * count,
            converged=each(found.converged),
            outcome=each(found.outcome),
            restarts=each(found.restarts),
            fallbacks=each(found.fallbacks),
            trace=None if found.trace is None else found.trace.expand(-1, count).clone(),
        )


def _kind(part: Any) -> str:
    """What an error message says of something that does not fit."""
    if isinstance(part, Tensor):
        return f"a tensor, {tuple(part.shape)}"
    if isinstance(part, Mapping):
        return f"a dict with the keys {[*part]}"
    return f"a {type(part).__name__} of {len(part)}" if isinstance(part, tuple | list) else f"{type(part).__name__}"
