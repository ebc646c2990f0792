"""Reads a W&B run that was recorded offline, record by record, from the ``.wandb`` file in its folder.

W&B writes LevelDB's log format: blocks of 32 KiB with fragments, each behind 7 bytes of checksum, length and kind.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

_MAGIC = b":W&B\xe1\xbe\x00"
_BLOCK = 32 * 1024
_FRAGMENT = struct.Struct("<IHB")
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


@dataclass
class OfflineRun:
    """What ``wandb sync`` would upload."""

    id: str = ""
    name: str = ""
    project: str = ""
    entity: str = ""
    group: str = ""
    job_type: str = ""
    notes: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    """Nested, as it was given to W&B."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """One dict a row, with W&B's own ``_step``."""
    summary: dict[str, Any] = field(default_factory=dict)
    """Each name with the value written last."""
    exit_code: int | None = None

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of the history that are rows of ``metrics.jsonl``; charts stand in others."""
        return [row for row in self.history if "step" in row]

    @property
    def logged(self) -> set[str]:
        """Names in any row or in the summary."""
        return set(self.summary).union(*self.history)


def read(folder: Path, kind: str = "offline-run") -> OfflineRun:
    """The one offline run in a run folder, or the one online run (``kind="run"``), which W&B records as well.

    Raises:
        ValueError: not one file, or one that is cut off or damaged.
    """
    files = list(folder.glob(f"wandb/{kind}-*/*.wandb"))
    if len(files) != 1:
        raise ValueError(f"{folder} must hold one {kind}, got {len(files)}")
    run = OfflineRun()
    for record in records(files[0].read_bytes()):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.id, run.name = record.run.run_id, record.run.display_name
            run.project, run.entity = record.run.project, record.run.entity
            run.group, run.tags = record.run.run_group, list(record.run.tags)
            run.job_type, run.notes = record.run.job_type, record.run.notes
            _update(run.config, record.run.config.update)
        elif kind == "config":
            _update(run.config, record.config.update)
        elif kind == "history":
            row: dict[str, Any] = {}
            _update(row, record.history.item)
            run.history.append(row)
        elif kind == "summary":
            _update(run.summary, record.summary.update)
        elif kind == "exit":
            run.exit_code = record.exit.exit_code
    return run


def records(content: bytes) -> Iterator[Record]:
    """The records of a ``.wandb`` file.

    Raises:
        ValueError: it is cut off or damaged.
    """
    if not content.startswith(_MAGIC):
        raise ValueError(f"not a .wandb file: it begins with {content[:7]!r}")
    position, parts = len(_MAGIC), list[bytes]()
    while position < len(content):
        left = _BLOCK - position % _BLOCK
        if left < _FRAGMENT.size:  # too little for a fragment: the block's end is filled up
            position += left
            continue
        if position + _FRAGMENT.size > len(content):
            raise ValueError(f"cut off at byte {position}")
        checksum, length, kind = _FRAGMENT.unpack_from(content, position)
        data = content[position + _FRAGMENT.size : position + _FRAGMENT.size + length]
        if zlib.crc32(data, zlib.crc32(bytes([kind]))) != checksum:
            raise ValueError(f"cut off or damaged at byte {position}")
        if (kind in (_WHOLE, _FIRST)) != (not parts):
            raise ValueError(f"fragments out of order at byte {position}")
        parts.append(data)
        if kind in (_WHOLE, _LAST):
            yield Record.FromString(b"".join(parts))
            parts = []
        position += _FRAGMENT.size + length
    if parts:
        raise ValueError("cut off within a record")


def _update(values: dict[str, Any], items: Any) -> None:
    for item in items:
        *above, last = list(item.nested_key) or [item.key]
        node = values
        for key in above:
            node = node.setdefault(key, {})
        node[last] = json.loads(item.value_json)
