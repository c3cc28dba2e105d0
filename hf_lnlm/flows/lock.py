"""One run at a time in an output folder: a lock that the kernel releases when its holder ends, however it ends.

The file says which process on which host holds it, for the message only; whether it is held is the kernel's word
(`flock`). Where a file system has no such locks, the file itself counts: another host's is never taken as stale.
"""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from ..errors import UsageProblem
from ..hub.folder import shown
from .manifest import LOCK_FILE
from .output import is_first_process, warn

_HELD: set[FolderLock] = set()
_BUSY = (errno.EWOULDBLOCK, errno.EACCES, errno.EAGAIN)
_MOST_BYTES = 300


class FolderLock:
    """The lock of an output folder, held by the first process of a run; a context manager that lets go of it.

    Args:
        folder: the run's.
        output: the one file in it that is written, where it isn't the whole folder.
    """

    def __init__(self, folder: Path, output: str = "") -> None:
        self.folder, self.output = folder, folder / output
        self.path = folder / (f".{output}.lock" if output else LOCK_FILE)
        self._handle: int | None = None
        self._owner: int | None = None

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.release()

    def take(self) -> bool:
        """Take the lock, making the folder and the file; does nothing where it is held already, or in other processes.

        Returns:
            Whether it was taken now.

        Raises:
            UsageProblem: another process holds it, or there is a link of its name.
        """
        if self._owner is not None or not is_first_process():
            return False
        self.folder.mkdir(parents=True, exist_ok=True)
        while self._owner is None:
            self._try()
        _HELD.add(self)
        return True

    def refuse_if_held(self) -> None:
        """Say who holds the lock, if anybody does; leaves no trace.

        Raises:
            UsageProblem: another process holds it.
        """
        if self._owner is None and self.path.is_file():
            self.take()

    def release(self) -> None:
        """Let go of the lock and remove its file."""
        if self._owner == os.getpid():
            self.path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Forget the lock: in a forked process, which must not keep it from the kernel."""
        _HELD.discard(self)
        if self._handle is not None:
            os.close(self._handle)
        self._handle = self._owner = None

    def _try(self) -> None:
        """Open the file and lock it; a file that was removed in between is none, so that nothing is held then."""
        handle = self._open()
        try:
            kernel = self._lock(handle)
            if kernel and not self._in_place(handle):
                return
            if not kernel:
                self._go_by_content(handle)
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
            self._handle, self._owner, handle = handle, os.getpid(), -1
        finally:
            if handle >= 0:
                os.close(handle)

    def _open(self) -> int:
        try:
            return os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise UsageProblem(f"{shown(self.path)} is a link: remove it") from None
            raise

    def _lock(self, handle: int) -> bool:
        """Whether the kernel gave the lock; False where it knows none.

        Raises:
            UsageProblem: it is held.
        """
        if fcntl is None:
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _BUSY:
                raise UsageProblem(
                    f"{self.output} is in use by a run ({_holder(handle)}): wait for it, or give another --output"
                ) from None
            return False
        return True

    def _in_place(self, handle: int) -> bool:
        try:
            found = os.stat(self.path, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(found, os.fstat(handle))

    def _go_by_content(self, handle: int) -> None:
        """Without a kernel's lock: refuse what another host or a living process of this one wrote.

        Raises:
            UsageProblem: the file names one.
        """
        number, host = _content(handle)
        if number and (host != socket.gethostname() or _lives(number)):
            raise UsageProblem(
                f"{self.output} is in use by a run ({_holder(handle)}), as far as can be told: its file system has "
                f"no locks. If that run has ended, delete {self.path.name} there"
            )
        warn(f"{self.output} can't be locked: its file system has no locks. Start no other run there")


def _content(handle: int) -> tuple[int, str]:
    """Process id and host of a lock file; 0 and an empty name where it names none."""
    number, _, host = os.pread(handle, _MOST_BYTES, 0).decode(errors="replace").strip().partition(" ")
    return (int(number), host) if number.isascii() and number.isdigit() else (0, "")


def _holder(handle: int) -> str:
    number, host = _content(handle)
    return f"process {number} on {shown(host)}" if number else "it has not said which"


def _lives(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _forget_in_child() -> None:
    for lock in list(_HELD):
        lock.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
