"""One run at a time in a run folder: a lock of the operating system on RUN_DIR/lock, held until the run ends.

Two that write in one folder would mix their rows and move each other's checkpoints aside; a scheduler that starts a job
again while the old one still lives does just that. The kernel frees the lock with the process, however it ends, so a
kill leaves nothing behind but the file, whose text says who had it last. On NFS Linux makes of flock a lock of the
server's, which holds between hosts (flock(2)).

Left out: commands that only read a run take no lock, nor do those that write beside one (audit, calibrate, report,
rehearsal) and `ablate`, whose runs have folders of their own.
"""

import fcntl
import os
import socket
import sys
from pathlib import Path

from sharding import multihost

FILE = "lock"


class RunLock:
    """Of several processes the first takes it. Use it in `with`: it is freed on the way out."""

    def __init__(self):
        self._file: int | None = None

    def take(self, folder: Path) -> None:
        """Makes the folder, if need be, and locks it; nothing where this object has done so. All processes call it.

        Raises ValueError, one line, on the first process where another run holds it; the others learn of it as of any
        bad input. On a file system without locks one line on stderr says so, and the run goes on.
        """
        if self._file is not None or not multihost.is_first():
            return
        folder.mkdir(parents=True, exist_ok=True)
        # writable, as NFS wants it, and not inherited: a grader that outlives the run would hold it on
        file = os.open(folder / FILE, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            holder = os.read(file, 200).decode(errors="replace").strip() or "another process"
            os.close(file)
            raise ValueError(
                f"{folder}: in use by {holder}: wait until that run has ended, end it, or name another folder"
            ) from error
        except OSError as error:
            print(
                f"warning: {folder}: its file system has no locks ({error.strerror}): start no second run on this "
                "folder while this one lives",
                file=sys.stderr,
            )
        self._file = file
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None
