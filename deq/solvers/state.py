"""States of several tensors: a nest of them lies in one flat buffer, which is all that a solver sees."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

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

    def flat_map(self, f: Callable[[Any], Nest], *, cast: bool = False) -> Callable[[Tensor], Tensor]:
        """f, which maps nests, as a map of flat buffers, (n, D) -> (n, D) for any n; ``cast`` as in :meth:`pack`."""

        def mapped(flat: Tensor) -> Tensor:
            return self.pack(f(self.unpack(flat)), "f(z)", samples=len(flat), cast=cast)

        return mapped

    def _views(self, parts: Sequence[Tensor]) -> list[Tensor]:
        return [part.view(len(part), *shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def _match(self, nest: Nest, name: str) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a nest of this structure in order, with their names."""

        def walk(skeleton: Skeleton, part: Any, name: str) -> Iterator[tuple[str, Tensor]]:
            if isinstance(skeleton, int):
                if not isinstance(part, Tensor):
                    raise ValueError(f"{name} must be a tensor as in the state, got {_kind(part)}: return one there")
                yield name, part
            elif isinstance(skeleton, dict):
                if not isinstance(part, Mapping) or part.keys() != skeleton.keys():
                    raise ValueError(
                        f"{name} must be a dict with the keys {[*skeleton]} of the state, got {_kind(part)}"
                    )
                for key, inner in skeleton.items():
                    yield from walk(inner, part[key], f"{name}[{key!r}]")
            else:
                if not isinstance(part, tuple | list) or len(part) != len(skeleton):
                    kind = f"{type(skeleton).__name__} of {len(skeleton)}"
                    raise ValueError(f"{name} must be a {kind} as in the state, got {_kind(part)}")
                for i, inner in enumerate(skeleton):
                    yield from walk(inner, part[i], f"{name}[{i}]")

        return walk(self._skeleton, nest, name)


def _kind(part: Any) -> str:
    """What an error message says of something that does not fit."""
    if isinstance(part, Tensor):
        return f"a tensor, {tuple(part.shape)}"
    if isinstance(part, Mapping):
        return f"a dict with the keys {[*part]}"
    return f"a {type(part).__name__} of {len(part)}" if isinstance(part, tuple | list) else f"{type(part).__name__}"
