"""Ends all processes of a run when one of them ends early, at once and with one line that says which.

Every process keeps one TCP connection to process 0. The kernel closes it when a process is killed, and its keep-alive
finds a host that went without a word; nothing is sent, so a process that is only busy is never taken for a lost one.
Whatever ends a run is passed on over the same connections: a lost process, a failure, bad input.

JAX has a watch of its own, the heartbeats of its coordination service. It says less and ends a process by abort(), with
a stack trace and exit code 134. Where it comes first (a process hangs but lives; no connection could be made; process 0
was killed, which both see at the same moment), its abort is turned into such a line and exit code 1.
"""

import contextlib
import ctypes
import json
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

CONNECT_S = 3.0  # for each address that process 0 might be reached at
ALL_CONNECT_S = 15.0  # for all to have reached it
LAST_WORDS_S = 5.0  # for the others to take notice of an end
KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}  # seconds, seconds, probes: 30 s in all

_handlers = []  # what C calls must not be freed


def on_abort(act: Callable[[], None]) -> None:
    """Has an abort() of this process call `act`, which ends it. Python's own handlers would run too late: after it."""
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _number: act())
    _handlers.append(handler)
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))


def last_line(line: str) -> None:
    """On the error output, past every lock that another thread may hold; a live display may have hidden the cursor."""
    cursor = "\x1b[?25h" if sys.stdout.isatty() else ""
    os.write(2, f"{cursor}error: {line}\n".encode())


class Lifeline:
    """The connections of one process. `advice` is said behind the reason for an end.

    Args:
      hosts: the name of each process's host.
    """

    def __init__(self, process: int, hosts: list[str]):
        self.process, self.hosts, self.advice = process, hosts, ""
        self._connections: dict[socket.socket, int] = {}  # and the process at the other end
        self._left: set[int] = set()  # processes that have ended as they should
        self._complete = threading.Event()  # on process 0: all others are connected
        self._ending = threading.Lock()  # whoever takes it ends this process
        on_abort(self._aborted)

    @classmethod
    def join(cls, process: int, gather: Callable[[object], list]) -> "Lifeline":
        """Connects all processes with process 0. `gather` exchanges values of JSON types between them."""
        server = _listen() if process == 0 else None
        mine = {"host": socket.gethostname(), "port": server.getsockname()[1] if server else 0}
        everyone = gather(mine | ({"addresses": _addresses(), "token": secrets.token_hex(16)} if server else {}))
        self, first = cls(process, [each["host"] for each in everyone]), everyone[0]
        if server:
            self._start(self._serve, server, first["token"])
            self._complete.wait(ALL_CONNECT_S)  # what ends this process at once must reach them
        else:
            near = first["host"] == mine["host"]
            self._connect((["127.0.0.1"] if near else []) + first["addresses"], first["port"], first["token"])
        return self

    def leave(self) -> None:
        """This process is about to end as it should, and so are the others."""
        self._left.update(range(len(self.hosts)))
        for connection in self._connections:
            _send(connection, {"left": True})

    def end(self, code: int, line: str, everywhere: bool) -> NoReturn:
        """Ends all processes. The line is printed by process 0, or `everywhere`."""
        if self.process:
            for connection in self._connections:
                _send(connection, {"end": code, "line": line, "everywhere": everywhere})
                time.sleep(LAST_WORDS_S)  # process 0 ends this one too, or else cannot be reached
            everywhere = True
        self._conclude(code, line, everywhere)

    def wait(self) -> None:
        """For what broke a collective of this process to come through; returns if nothing does."""
        time.sleep(LAST_WORDS_S)

    def _conclude(self, code: int, line: str, everywhere: bool) -> NoReturn:
        """Ends this process, and on process 0 the others before it; only the first call has an effect."""
        if not self._ending.acquire(blocking=False):
            time.sleep(60)  # the thread that has it ends the process meanwhile
        if everywhere or not self.process:
            last_line(f"{line}{self.advice and '; '}{self.advice}")
        if not self.process:
            self._tell({"end": code, "line": line, "everywhere": everywhere})
        os._exit(code)

    def _tell(self, message: dict) -> None:
        """To all others; returns when they have ended, or LAST_WORDS_S later."""
        until = time.monotonic() + LAST_WORDS_S
        for connection in list(self._connections):
            _send(connection, message)
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_WR)
                connection.settimeout(max(until - time.monotonic(), 0.01))
                while connection.recv(4096):  # what is left unread at the end would take our words with it
                    pass

    def _gone(self, process: int) -> None:
        if process not in self._left:
            self._conclude(1, f"process {process} of {len(self.hosts)} (on {self.hosts[process]}) is gone", True)

    def _hear(self, connection: socket.socket) -> bool:
        """Acts on what came; False where the other end has closed."""
        process = self._connections[connection]
        try:
            received = connection.recv(1 << 16)
        except OSError:
            received = b""
        for line in received.splitlines():
            message = json.loads(line)
            if "left" in message:
                self._left.add(process)
            else:
                self._conclude(message["end"], message["line"], message["everywhere"])
        if not received:
            self._gone(process)
        return bool(received)

    def _connect(self, addresses: list[str], port: int, token: str) -> None:
        for address in addresses:
            with contextlib.suppress(OSError):
                connection = socket.create_connection((address, port), CONNECT_S)
                _send(connection, {"token": token, "process": self.process})
                if connection.recv(2) == b"ok":
                    self._connections[_kept_alive(connection)] = 0
                    self._start(self._watch, connection)
                    return
        places = ", ".join(f"{address}:{port}" for address in addresses)
        print(
            f"warning: process {self.process} cannot reach process 0 at {places}: a lost process is noticed late",
            file=sys.stderr,
        )

    def _watch(self, connection: socket.socket) -> None:
        while self._hear(connection):
            pass

    def _serve(self, server: socket.socket, token: str) -> None:
        """Hears nobody before all are connected: what ends one of the first must reach the last, too."""
        unheard, until = [], time.monotonic() + ALL_CONNECT_S
        with selectors.DefaultSelector() as selector:
            selector.register(server, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select(max(until - time.monotonic(), 0) if unheard else None):
                    if key.fileobj is server:
                        unheard += self._accept(server, token)
                    elif not self._hear(key.fileobj):
                        selector.unregister(key.fileobj)
                if self._complete.is_set() or time.monotonic() > until:
                    for connection in unheard:
                        selector.register(connection, selectors.EVENT_READ)
                    unheard = []

    def _accept(self, server: socket.socket, token: str) -> list[socket.socket]:
        """The connection, if it is of a process of this run; anything else that knocks is turned away."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            connection, _ = server.accept()
            connection.settimeout(CONNECT_S)
            hello = json.loads(connection.recv(4096))
            if secrets.compare_digest(hello["token"], token):
                connection.sendall(b"ok")
                self._connections[_kept_alive(connection)] = hello["process"]
                if len(self._connections) == len(self.hosts) - 1:
                    self._complete.set()
                return [connection]
            connection.close()
        return []

    def _aborted(self) -> None:
        line = f"process {self.process}: JAX gave up, as it does when another process is gone; it says why above"
        self._conclude(1, line, True)

    @staticmethod
    def _start(function: Callable, *arguments) -> None:
        threading.Thread(target=function, args=arguments, name="lifeline", daemon=True).start()


def _listen() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _addresses() -> list[str]:
    """Where other hosts may reach this one."""
    found = []
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing: the route out tells the address
        found.append(probe.getsockname()[0])
    with contextlib.suppress(OSError):
        found += [each[4][0] for each in socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)]
    return [*dict.fromkeys(address for address in found if not address.startswith("127."))]


def _kept_alive(connection: socket.socket) -> socket.socket:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEP_ALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection


def _send(connection: socket.socket, message: dict) -> None:
    with contextlib.suppress(OSError):  # it is gone already, which its reader notices
        connection.sendall(json.dumps(message).encode() + b"\n")
