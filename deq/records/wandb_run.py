"""A run in Weights & Biases: online, offline, or given up with one warning, while the run itself goes on."""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import shlex
import shutil
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from deq.records.errors import UserError, first_line, in_yaml
from deq.records.files import shown
from deq.records.traces import Trace
from deq.records.waiting import Result, within

_MODES = ("auto", "online", "offline", "disabled")
_WANDB_MODES = {
    "online": "online",
    "run": "online",
    "shared": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}
"""What W&B takes in WANDB_MODE → what that is here."""

_PROJECT = "anderson-deq"
_DAY = 86400
_NOT_USED = {
    "console": "W&B does not record this program's terminal",
    "silent": "W&B prints nothing on this program's terminal",
    "reinit": "every run is one of its own in W&B",
    "init_timeout": "give logger.timeout, the seconds that one call to W&B may take",
    "finish_timeout": "give logger.timeout, the seconds that one call to W&B may take",
}
"""W&B's settings that a run makes itself → why the user's are not used."""

_GRACE = 15.0
"""Seconds beyond ``timeout`` in which W&B itself finds that it timed out, for which it takes up to 10, and makes do."""

_unreachable: set[str] = set()
"""Addresses of W&B that this process has waited for in vain: the next job of a sweep does not wait again."""

_left_out: set[str] = set()
"""Variables that W&B does not take. Who set an address, say, does not want the next job at W&B's own either."""


@dataclass(frozen=True)
class WandbOptions:
    """How a run appears in W&B; see ``conf/logger/wandb.yaml``.

    What is None is left to W&B's environment variables and settings files, and where they say nothing either, to this
    project.

    Args:
        project: W&B project; None takes WANDB_PROJECT, or else anderson-deq.
        mode: auto (online for a user who is logged in, else offline), online, offline or disabled; the environment
            variables WANDB_MODE and WANDB_DISABLED go before ``auto``.
        group: W&B group; None takes WANDB_RUN_GROUP, or else the sweep's folder in a multirun.
        name: W&B's display name; None takes WANDB_NAME, or else the run folder's name.
        tags: W&B tags, beside those of the run, which are its data, model and solver; None takes WANDB_TAGS.
        timeout: seconds that any one call to W&B may take, from 1 to 86400.
    """

    project: str | None = None
    mode: str = "auto"
    group: str | None = None
    name: str | None = None
    tags: Sequence[str] | None = None
    timeout: float = 30.0

    def __post_init__(self) -> None:
        if self.mode not in _MODES:
            raise UserError(f"logger.mode must be one of {', '.join(_MODES)}, got {in_yaml(self.mode)}")
        timeout = self.timeout
        if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout >= 1:
            raise UserError(f"logger.timeout must be a number of at least 1, in seconds, got {in_yaml(timeout)}")
        if timeout > _DAY:
            raise UserError(f"logger.timeout must be at most {_DAY} seconds, which is a day, got {timeout}")
        project = self.project
        if project is not None and (not isinstance(project, str) or not project.strip()):
            raise UserError(f"logger.project must be a text, such as anderson-deq, got {in_yaml(project)}")
        if project is not None and (len(project) > 128 or set(project) & set("/\\#?%:")):
            raise UserError(rf"logger.project must have at most 128 characters, none of / \ # ? % :, got {project!r}")
        for knob in ("group", "name"):
            value = getattr(self, knob)
            if value is not None and not isinstance(value, str):
                raise UserError(
                    f"logger.{knob} must be a text or null, got {in_yaml(value)}; quote it: logger.{knob}='\"{value}\"'"
                )
            if value is not None and not value.strip():
                raise UserError(f"logger.{knob} must be a text or null, got {value!r}; leave it out for the default")
        if self.tags is None:
            return
        if isinstance(self.tags, str) or not isinstance(self.tags, Sequence):
            raise UserError(f"logger.tags must be a list, such as [first,second], got {in_yaml(self.tags)}")
        tag: Any  # whatever the command line has
        for tag in self.tags:
            if isinstance(tag, bool) or not isinstance(tag, str | int | float):
                raise UserError(f"each of logger.tags must be a text, such as first, got {in_yaml(tag)}")
            if not 1 <= len(str(tag).strip()) <= 64:
                raise UserError(f"each of logger.tags must have 1 to 64 characters, got {str(tag)!r}")


def wanted_mode(options: WandbOptions, warn: Callable[[str], None]) -> str:
    """One of :data:`_MODES`: the knob's, and where that is auto, WANDB_DISABLED's or WANDB_MODE's."""
    if options.mode == "auto" and os.environ.get("WANDB_DISABLED", "").strip().lower() in ("true", "1", "yes", "on"):
        return "disabled"  # W&B itself asks for this variable no more, but scripts still set it
    variable = os.environ.get("WANDB_MODE")
    if variable is None or not variable.strip():
        return options.mode
    known = _WANDB_MODES.get(variable.strip().lower())
    if known is None and options.mode == "auto":
        warn(f"WANDB_MODE must be online, offline or disabled, got {variable!r}; this run is kept offline")
    if variable not in _WANDB_MODES:
        # W&B does not start where the variable holds what it does not know, even if it is told the mode.
        os.environ["WANDB_MODE"] = known or "offline"
    return (known or "offline") if options.mode == "auto" else options.mode


class WandbRun:
    """A W&B run that gives up, with one warning, at the first thing that goes wrong."""

    def __init__(
        self,
        options: WandbOptions,
        wanted: str,
        folder: Path,
        config: dict[str, Any],
        *,
        group: str | None,
        tags: tuple[str, ...],
        warn: Callable[[str], None],
    ) -> None:
        self._warn = warn
        self._timeout = options.timeout
        self._run: Any = None
        self.note: str | None = None

        def start() -> tuple[Any, str]:
            return _begin(options, wanted, folder, config, group=group, tags=tags, warn=warn)

        self._mode = wanted
        started = self._try("start", start)
        if started is not None:
            self._run, self._mode = started
            place = Path(self._run.settings.sync_dir)
            _link(place, folder / "wandb")
            self._upload = f"upload with: wandb sync {shlex.quote(shown(place))}"
            self.note = f"offline; {self._upload}" if self._mode == "offline" else str(self._run.url)

    def chart(self, name: str, traces: Sequence[Trace], against: str) -> None:
        def draw() -> None:
            import wandb

            chart = wandb.plot.line_series(
                xs=[getattr(trace, against) for trace in traces],
                ys=[[math.log10(r) if r > 0 else None for r in trace.residual_mean] for trace in traces],
                keys=[trace.solver for trace in traces],
                title=f"log10 of the mean relative residual against {against}",
                xname=against,
            )
            self._run.log({name: chart})

        self._try("chart", draw)

    def log(self, row: dict[str, float]) -> None:
        # Committed at once: a row that is kept back until the next one comes is missing in the charts of a run that
        # goes on, and at the end of one its values would be written over the summary's.
        self._try("log", lambda: self._run.log(row, step=int(row["step"]), commit=True))

    def finish(self, summary: Mapping[str, float], failed: bool) -> None:
        def close() -> None:
            import wandb

            run = self._run
            run.summary.update(dict(summary))
            try:
                run.finish(exit_code=int(failed))
            except TimeoutError:
                self.note = f"not all of it; {self._upload}"
                self._warn(f"W&B did not take all of this run in {self._timeout:g} s; {self._upload}")
            # finish() only tells W&B's own process to close the offline file; the end of that process is waited for.
            if self._run is run:  # else it was given up long ago, and the process is at a later run by now
                wandb.teardown(exit_code=int(failed))

        self._try("finish", close)

    def _try(self, what: str, call: Callable[[], Result]) -> Result | None:
        """The call's result, or None after one warning if it raised or took too long. Silent once given up."""
        if what != "start" and self._run is None:
            return None
        # Online W&B has the same limit for these two, and is given the time to say so.
        seconds = self._timeout + (_GRACE if self._mode != "offline" and what in ("start", "finish") else 0)
        result, error = within(seconds, call, f"wandb-{what}")
        if error is not None:
            self._run, self.note = None, None
            reason = _reason(error)
            self._warn(f"W&B failed at {what} ({reason}); the run goes on, and its files are complete without it")
        return result


class _StayOffline(Exception):  # noqa: N818  # not an error: the run goes on
    """W&B cannot be online; its text is the sentence that tells why, or empty where nobody has to be told."""


def _begin(
    options: WandbOptions,
    wanted: str,
    folder: Path,
    config: dict[str, Any],
    *,
    group: str | None,
    tags: tuple[str, ...],
    warn: Callable[[str], None],
) -> tuple[Any, str]:
    """W&B's run, and whether it is online or offline: online if that is wanted and W&B lets it, else offline."""
    # W&B's reports of its own errors hold up the end of the program by 10 s where a firewall swallows them.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb  # here, since it is slow to import and need not be installed

    # The terminal is this program's: W&B neither prints on it nor reads from it.
    wandb.termsetup(wandb.Settings(silent=True), None)
    ours: dict[str, Any] = {
        "silent": True,
        "console": "off",
        "reinit": "create_new",
        "init_timeout": options.timeout,
        "finish_timeout": options.timeout,
    }
    _look_at_environment(ours, warn)
    mode = "offline" if wanted == "offline" or _left_out else "online"
    # W&B's own reading of its environment variables and settings files; the mode is decided here.
    theirs = wandb.setup(wandb.Settings(silent=True, mode=mode)).settings  # type: ignore[arg-type]
    if group is not None and theirs.run_id is not None:
        warn(f"WANDB_RUN_ID={theirs.run_id} is not used in a sweep: every job is a run of its own")
    if theirs.sweep_id is not None and options.project is not None:
        warn(f"logger.project={options.project} is not used: WANDB_SWEEP_ID={theirs.sweep_id} has a project already")
    run_id = theirs.run_id if group is None else None
    if run_id is None and theirs.resume != "auto":  # for auto W&B looks for the id itself
        run_id = secrets.token_hex(6)
    arguments: dict[str, Any] = {
        "project": options.project or theirs.project or _PROJECT,
        "name": options.name or theirs.run_name or folder.name,
        "group": options.group or theirs.run_group or group,
        "tags": sorted({*_tags(theirs.run_tags if options.tags is None else options.tags), *tags}),
        "config": config,
        "dir": str(_place(theirs.root_dir if "root_dir" in theirs.model_fields_set else None, folder, warn)),
        "id": run_id,
        "settings": wandb.Settings(**ours, finish_timeout_raises=True),
    }
    if mode == "online":
        try:
            return _online(theirs, arguments, wanted, options.timeout), "online"
        except _StayOffline as why:
            if str(why):
                warn(str(why))
    if theirs.resume in ("allow", "must"):
        warn(f"WANDB_RESUME={theirs.resume} is not used offline: only W&B's server knows how far a run has come")
    wandb.setup(wandb.Settings(silent=True, mode="offline"))
    return wandb.init(mode="offline", **arguments), "offline"


def _online(theirs: Any, arguments: dict[str, Any], wanted: str, timeout: float) -> Any:
    """W&B's run, online.

    Raises:
        _StayOffline: nobody is logged in, W&B is out of reach, or it says no.
    """
    import wandb

    try:
        logged_in = wandb.login(prompt=False, verify=False)
    except Exception as error:
        raise _StayOffline(
            f"W&B cannot use this login ({_reason(error)}); this run is kept offline; mend WANDB_API_KEY, or run "
            "`wandb login --relogin`"
        ) from error
    if not logged_in:
        needed = "W&B: online needs a login (run `wandb login` once); this run is kept offline"
        raise _StayOffline(needed if wanted == "online" else "")
    url = theirs.base_url
    if url in _unreachable:
        raise _StayOffline  # told already

    def out_of_reach(what: str, mend: str) -> _StayOffline:
        _unreachable.add(url)
        return _StayOffline(
            f"W&B at {url} {what}; this run is kept offline, and so are those after it in a sweep; {mend}"
        )

    slow = f"where the network is only slow, give logger.timeout more than {timeout:g} s"
    try:
        if theirs.http_proxy is None and theirs.https_proxy is None:
            _try_to_connect(url, timeout / 3)
    except TimeoutError as error:
        raise out_of_reach(f"cannot be connected to in {timeout / 3:g} s", slow) from error
    except OSError as error:
        raise out_of_reach(f"cannot be reached ({_reason(error)})", "look at the network and WANDB_BASE_URL") from error
    begin = time.monotonic()
    try:
        return wandb.init(mode="online", **arguments)
    except Exception as error:
        in_vain = time.monotonic() - begin >= timeout  # W&B has no error of its own for this
        with contextlib.suppress(SystemExit):  # how W&B tells that its process did not end well
            wandb.teardown()  # it holds on to the run that did not come to be
        for left in Path(arguments["dir"]).glob(f"*wandb/run-*-{arguments['id']}"):
            shutil.rmtree(left, ignore_errors=True)
        if in_vain:
            raise out_of_reach(f"did not begin this run in {timeout:g} s ({_reason(error)})", slow) from error
        raise _StayOffline(
            f"W&B at {url} refused this run ({_reason(error)}); it is kept offline; look at WANDB_API_KEY, "
            "WANDB_ENTITY and logger.project"
        ) from error


def _try_to_connect(url: str, seconds: float) -> None:
    """Look whether anything is there: W&B itself would go on trying for its whole timeout where nothing can come of it.

    In 10 of the 30 seconds that are the default, a connection is tried 4 times (after 0, 1, 3 and 7 s). The way over
    a proxy is left to W&B.

    Raises:
        OSError: no connection.
    """
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    if parts.scheme in getproxies() and not proxy_bypass(host):
        return
    addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    socket.create_connection((host, port), seconds / len(addresses)).close()


def _look_at_environment(ours: Mapping[str, Any], warn: Callable[[str], None]) -> None:
    """Leave out each WANDB_* variable that W&B would stop at, and tell of each that is not used.

    Args:
        ours: what a run sets itself, the keys of :data:`_NOT_USED`.
    """
    import wandb

    for name, value in sorted(os.environ.items()):
        if not name.startswith("WANDB_"):
            continue
        alone = wandb.Settings()
        try:
            if value.strip():
                alone.update_from_env_vars({name: value})
            else:
                del os.environ[name]  # as good as not set, though W&B would stop at some
            _left_out.discard(name)
        except Exception as error:
            del os.environ[name]
            _left_out.add(name)
            given = name if "KEY" in name else f"{name}={value}"  # a secret is not shown
            warn(
                f"W&B does not take {given} ({_reason(error)}); this run is kept offline without it, and so are those "
                "after it in a sweep; mend it or unset it"
            )
            continue
        for key in alone.model_fields_set & _NOT_USED.keys():
            if getattr(alone, key) != ours[key]:
                warn(f"{name}={value} is not used: {_NOT_USED[key]}")


def _tags(given: Sequence[Any] | None) -> set[str]:
    return {str(tag).strip() for tag in given or ()}


def _place(wanted: str | None, folder: Path, warn: Callable[[str], None]) -> Path:
    """Where W&B makes its folder: WANDB_DIR's, or the run folder where there is none that can be written."""
    if wanted is None:
        return folder
    place = Path(wanted).expanduser().absolute()
    try:
        place.mkdir(parents=True, exist_ok=True)
        writable = os.access(place, os.W_OK | os.X_OK)
    except OSError:
        writable = False
    if not writable:
        warn(f"WANDB_DIR={wanted} cannot be written; W&B's files are in {shown(folder / 'wandb')}; give another folder")
    return place if writable else folder


def _link(place: Path, folder: Path) -> None:
    """Make W&B's folder of a run to be found in ``folder``, from which it is uploaded and set aside, wherever it is."""
    with contextlib.suppress(OSError):  # a file system without links
        if place.parent.resolve() != folder.resolve():
            folder.mkdir(exist_ok=True)
            (folder / place.name).symlink_to(place)


def set_aside(folder: Path) -> None:
    """Rename W&B's offline runs in ``folder``: the run that goes on logs their rows again, and is the one to upload."""
    with contextlib.suppress(OSError):
        for before in folder.glob("offline-run-*"):
            there = before.resolve()
            there.rename(there.with_name(f"superseded-{there.name}"))
            if before.is_symlink():
                before.unlink()


def _reason(error: BaseException) -> str:
    """What W&B says, in one line. Of a value that it does not take, what it would."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    details = getattr(error, "errors", None)
    return str(details()[0]["msg"]).removeprefix("Value error, ") if callable(details) else first_line(error)
