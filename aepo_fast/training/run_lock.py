"""One run at a time in a folder: a lock that names its holder and that a killed run cannot leave.

The lock is the kernel's (flock) on `run.lock`, so it ends with its process, however that ends. The
file says who holds it. Linux carries flock over NFS; for file systems that do not, and for those
without any locks, the file's own words count as well:

- of a process of this machine: it holds the folder while it lives and is no later process of the
  same number;
- of another machine: whether it lives cannot be seen from here, so its word counts until someone
  deletes the file. A container of the same machine is no other machine: they share a kernel.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from aepo_fast.config.errors import ConfigError

LOCK_NAME = "run.lock"
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class RunLock:
    """Holds `folder` for one run; made with its parents, which go again if nothing was written.

    Raises ConfigError where another run holds it, and OSError where the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / LOCK_NAME
        self._handle: int | None = None
        self._made: list[Path] = []

    def __enter__(self) -> RunLock:
        self._made = [one for one in (self.folder, *self.folder.parents) if not one.exists()]
        if self.folder.parent in self._made:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            with _alone_in(self.folder.parent):
                if self.folder in self._made and self.folder.exists():  # now another run's
                    self._made.remove(self.folder)
                self.folder.mkdir(exist_ok=True)
                self._take()
        except BaseException:
            self._close()
            raise
        _OPEN.add(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _OPEN.discard(self)
        with _alone_in(self.folder.parent):
            if _read(self.path) == _me():  # else someone has deleted it, and it may be another's
                self.path.unlink(missing_ok=True)  # before it is open to others
            self._close()
            for folder in self._made:
                try:
                    folder.rmdir()
                except OSError:  # there is something in it
                    return

    def _take(self) -> None:
        while True:
            self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise self._refusal(_wait_for_words(self.path), lives=True) from None
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
                words = f"{self.folder} has no file locks ({os.strerror(error.errno or 0)})"
                print(f"{words}: of two runs started together none is refused", file=sys.stderr)
            if _same_file(self._handle, self.path):
                break
            self._close()  # the run before has deleted it between our two calls
        holder = _read(self.path)
        if holder and holder != _me() and _may_live(holder):
            raise self._refusal(holder, lives=_of_this_machine(holder))
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, (json.dumps(_me()) + "\n").encode(), 0)

    def _refusal(self, holder: dict[str, Any], *, lives: bool) -> ConfigError:
        who = f"process {holder.get('pid')} on {holder.get('host')}"
        reason = f"a run is using it: {who}, started {holder.get('started')}"
        if not holder:
            reason = "another run is just starting in it"
        fix = "Wait for it or stop it, or name another folder"
        if not lives:
            here = f"which cannot be seen from {platform.node()}"
            fix += f". If that run has ended, {here}, delete {self.path}"
        return ConfigError("output_dir", str(self.folder), reason, fix)

    def _close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


# A forked child has a copy of the handle: without this the lock would outlive its run with it.
_OPEN: weakref.WeakSet[RunLock] = weakref.WeakSet()


def _close_in_child() -> None:
    for lock in list(_OPEN):
        lock._close()
    _OPEN.clear()


os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def _alone_in(parent: Path) -> Iterator[None]:
    """Keep other runs from making or leaving a folder in `parent` meanwhile.

    Between making a folder and holding it another run could take it, and none would remove it.
    """
    with ExitStack() as stack:
        try:
            handle = os.open(parent, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, handle)
            for _ in range(40):  # someone may keep the parent locked for other reasons
                with suppress(BlockingIOError):
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                time.sleep(0.05)
        except OSError:  # such a parent cannot be locked: an empty folder may stay
            pass
        yield


def _me() -> dict[str, Any]:
    """What a lock says of the run of this process."""
    pid = os.getpid()
    return {
        "pid": pid,
        "host": platform.node(),
        "started": datetime.fromtimestamp(_STARTED).isoformat(" ", "seconds"),
        "boot": _first_line("/proc/sys/kernel/random/boot_id"),
        "ticks": _start_ticks(pid),
    }


_STARTED = time.time()


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:  # not Linux, or such a process is not there
        return ""


def _start_ticks(pid: int) -> str:
    """When a process began, in clock ticks since the machine started; empty where unknown."""
    # Its name, in brackets, may hold spaces and brackets: field 22 is the 20th after it.
    fields = _first_line(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 else ""


def _of_this_machine(holder: dict[str, Any]) -> bool:
    boot = _me()["boot"]
    return holder.get("host") == platform.node() or bool(boot and holder.get("boot") == boot)


def _may_live(holder: dict[str, Any]) -> bool:
    """Whether the holder may live although no kernel lock says so."""
    if not _of_this_machine(holder):
        return True
    me, pid = _me(), holder.get("pid")
    if holder.get("host") != me["host"] or holder.get("boot") != me["boot"]:
        return False  # another container, whose kernel would hold its lock; or before a restart
    if not isinstance(pid, int) or _start_ticks(pid) != holder.get("ticks"):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _wait_for_words(path: Path) -> dict[str, Any]:
    """The holder's words; it writes them right after it has the lock."""
    for _ in range(20):
        if found := _read(path):
            return found
        time.sleep(0.05)
    return {}


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _same_file(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False
