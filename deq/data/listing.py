"""The images below a folder by class, and an account of everything else that lies there."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import NamedTuple, NoReturn

from torchvision.datasets.folder import IMG_EXTENSIONS

from deq.records.errors import UserError, first_line

KINDS = f"{', '.join(sorted(IMG_EXTENSIONS)[:-1])} or {max(IMG_EXTENSIONS)}"
"""The endings of the files that are read, for a sentence."""

_HIDDEN = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "Thumbs.db", "desktop.ini"}
"""What macOS, a Synology and Windows put into folders, beside everything whose name begins with a dot."""

_KINDS_TOLD = 8


class Sample(NamedTuple):
    """An image file. stamp: its size, and when its content and its entry changed (no tool sets the latter back)."""

    class_name: str
    folder: str
    name: str
    stamp: tuple[int, int, int]

    @property
    def path(self) -> Path:
        return Path(self.folder, self.name)


@dataclass(frozen=True)
class Listing:
    """What ``folder`` holds: samples by class, folder and name; and how much of which kind is left out."""

    folder: Path
    classes: tuple[str, ...]
    samples: tuple[Sample, ...]
    left_out: Counter[str]

    @property
    def labels(self) -> list[int]:
        """The class number of each sample."""
        number = {name: index for index, name in enumerate(self.classes)}
        return [number[sample.class_name] for sample in self.samples]

    def fingerprint(self, *how: object) -> str:
        """A hash of which files these are, and of ``how`` they are decoded; it changes when a file does."""
        key = hashlib.sha256(repr((how, self.folder.resolve(), self.classes)).encode())
        for sample in self.samples:  # repr, because a name need not be text that can be encoded
            path = os.path.relpath(sample.path, self.folder)
            key.update(repr((sample.class_name, path, sample.stamp)).encode())
        return key.hexdigest()

    def account(self) -> str | None:
        """One sentence on what is left out, if anything is."""
        if not self.left_out:
            return None
        most_first = sorted(self.left_out.items(), key=lambda one: (-one[1], one[0]))
        rest = sum(count for _, count in most_first[_KINDS_TOLD:])
        told = [*most_first[:_KINDS_TOLD], *([("others", rest)] if rest else [])]
        kinds = ", ".join(f"{kind} ({count})" for kind, count in told)
        return (
            f"data.root={self.folder.parent}: left out of {self.folder.name}/ are {kinds}; only {KINDS} files in "
            f"{self.folder.name}/<class>/ are read, so convert or move there what should be used"
        )


def listed(folder: Path) -> Listing:
    """The images in ``folder``/<class>/ and below, in the order of torchvision's ImageFolder.

    Hidden files and folders, files of other kinds and files beside the class folders are left out and counted; so are
    links to a folder in which they lie, which would hold every image many times.

    Raises:
        UserError: something cannot be read, there is no class, or one without an image.
    """
    classes: list[str] = []
    samples: list[Sample] = []
    left_out: Counter[str] = Counter()
    for here, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        kept = []
        for name in sorted(folders):
            reason = _no_folder(Path(here, name))
            if reason:
                left_out[reason] += 1
            else:
                kept.append(name)
        folders[:] = kept  # os.walk goes into these
        inside = Path(here).relative_to(folder).parts
        if not inside:
            classes = kept
        for name in names:
            if _hidden(name):
                left_out["hidden files"] += 1
                continue
            path = Path(here, name)
            with readable(path):
                status = path.stat()
            reason = _no_image(name, status) if inside else "files outside the class folders"
            if reason:
                left_out[reason] += 1
            else:
                stamp = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
                samples.append(Sample(inside[0], here, name, stamp))
    listing = Listing(folder, tuple(classes), tuple(sorted(samples)), left_out)
    _refuse_empty(listing)
    return listing


def _refuse_empty(listing: Listing) -> None:
    root, part = listing.folder.parent, listing.folder.name
    if not listing.classes:
        raise UserError(
            f"data.root={root}: {part}/ holds no class folder; data.root must hold train/ and test/, each with one "
            f"folder of images a class"
        )
    empty = sorted({*listing.classes} - {sample.class_name for sample in listing.samples})
    if empty:
        raise UserError(
            f"data.root={root}: {part}/ holds no {KINDS} file in {', '.join(empty)}; put images there, or take the "
            f"class away from train/ and test/"
        )


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns an OSError while ``path`` is looked at into a :class:`UserError`."""
    try:
        yield
    except OSError as error:
        dangling = path.is_symlink() and not isinstance(error, PermissionError)
        reason = "a link that leads nowhere" if dangling else error.strerror or first_line(error)
        raise UserError(f"{path} cannot be read ({reason}); mend it or take it away") from error


def _refuse(error: OSError) -> NoReturn:
    with readable(Path(error.filename)):
        raise error


def _hidden(name: str) -> bool:
    return name.startswith(".") or name in _HIDDEN


def _no_folder(path: Path) -> str | None:
    """Why a folder is left out, if it is."""
    if _hidden(path.name):
        return "hidden folders"
    # Only a link can lead back up. Every folder above counts, since the circle may go through other links.
    if path.is_symlink() and path.resolve() in {above.resolve() for above in path.parents}:
        return "links to a folder around them"
    return None


def _no_image(name: str, status: os.stat_result) -> str | None:
    """Why a file is left out, if it is."""
    ending = Path(name).suffix.lower()
    if ending not in IMG_EXTENSIONS:
        return f"{ending} files" if ending else "files without an ending"
    return None if S_ISREG(status.st_mode) else "pipes and devices"  # to open a pipe is to wait for ever
