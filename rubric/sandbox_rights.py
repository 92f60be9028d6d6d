"""How a sandboxed process takes its own rights away: limits of resources, a user of its own, a filter of system calls.

Imported by rubric/sandbox_child.py in a bare interpreter; stands on the standard library alone. Where the filter cannot
be installed, a hook on Python's audit events refuses what a program of Python could do with files, sockets, processes
and signals. The hook is Python, so native code gets past it; it refuses the ways to native code that are known.
"""

import ctypes
import os
import resource
import signal
import sys

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 1, 22, 38, 2
CLONE_NEWNET, CLONE_NEWUSER = 0x40000000, 0x10000000


class Program(ctypes.Structure):
    """struct sock_fprog: a filter in the kernel's own form, 8 bytes an instruction."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


libc = ctypes.CDLL(None, use_errno=True)


def limit(kind: int, value: int) -> None:
    """Soft and hard, and never above a hard limit that is there already."""
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def limit_resources(cpu_s: int, memory_bytes: int, alarm_s: float) -> None:
    signal.setitimer(signal.ITIMER_REAL, alarm_s)  # ends the child when its keeper was killed
    limit(resource.RLIMIT_CPU, cpu_s)
    limit(resource.RLIMIT_AS, memory_bytes)
    limit(resource.RLIMIT_FSIZE, 0)  # pipes are not files
    limit(resource.RLIMIT_NOFILE, 32)
    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_NPROC, 0)


def become_nobody() -> bool:
    """As root on Linux: a user that no other process has, so that its limit of processes holds and it owns no file."""
    for user in ((1 << 30) + os.getpid(), 65534):  # 65534 is nobody, where user numbers are mapped to a small range
        try:
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
        except OSError:
            continue
        return True
    return False


def filter_calls(program: bytes) -> bool:
    """Installs a filter of system calls; True when it is in force. There is no way back."""
    if not program:
        return False
    fprog = Program(len(program) // 8, program)
    return (
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
        and libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(fprog), 0, 0) == 0
    )


def leave_network(filtered: bool) -> bool:
    """A network of its own without a way out, for the keeper and so for its children. An ordinary user needs a
    namespace of users for that, which opens parts of the kernel: only where there is no filter."""
    if sys.platform != "linux" or (os.geteuid() != 0 and filtered):
        return False
    return libc.unshare(CLONE_NEWNET | (0 if os.geteuid() == 0 else CLONE_NEWUSER)) == 0


def audit() -> None:
    """The guard without a filter: Python's own calls that open, change, start, connect or signal something fail."""
    refused = ("os.", "socket.", "subprocess.", "shutil.", "ctypes.", "mmap.", "fcntl.", "resource.", "signal.", "pty.")
    refused += ("sqlite3.", "syslog.", "gc.", "tempfile.", "glob.", "webbrowser.", "sys.addaudithook", "cpython.")
    native = ("ctypes", "_ctypes", "_posixsubprocess", "_socket", "posix", "mmap", "signal", "resource", "fcntl")
    native += ("_testcapi", "_testinternalcapi", "_posixshmem", "_multiprocessing", "faulthandler", "readline")
    library, starts_with, error = os.path.dirname(os.__file__), str.startswith, PermissionError

    def hook(event, arguments, refused=refused, native=native, library=library, starts=starts_with, error=error):
        if event == "open":
            path, mode = arguments[0], arguments[1]  # os.open has no mode
            if type(path) is str and starts(path, library) and mode in ("r", "rb") and ".." not in path:
                return
            raise error("no file may be opened here")
        if (event == "import" and arguments[0] in native) or starts(event, refused):
            raise error(f"{event} is not allowed here")

    for name in native:
        if name != "posix":  # os stands on it
            sys.modules.pop(name, None)
    sys.addaudithook(hook)


def close_off(program: bytes) -> list[str]:
    """Takes the child's rights away; names what is in force."""
    force = ["own user"] if sys.platform == "linux" and os.geteuid() == 0 and become_nobody() else []
    if sys.platform == "linux":
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # after the change of user, which clears it
    if filter_calls(program):
        return ["seccomp", *force]
    audit()
    return ["audit hook", *force]
