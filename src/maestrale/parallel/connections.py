"""Messages between ranks: a TCP connection for each two of them, and nothing but the threads that compute.

torch.distributed's sends need a thread of gloo's on either side for every message; where each core computes, they wait
for a turn of it: milliseconds a step. Here who sends writes and who receives reads, itself; only what the kernel's
buffers do not take at once is left to a thread. A message is its length, int64, and its bytes; a length of -1 has no
bytes and says only that the sender lives.
"""

from __future__ import annotations

import hmac
import secrets
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

_HEAD = struct.Struct("<q")
_HELLO = struct.Struct("<32sq")  # the job's secret, and who calls
_ALIVE = -1
_MAX_BYTES = 1 << 34  # of a message
_BUFFER = 4 << 20  # bytes that the kernel is asked to keep of a connection
_HELLO_SECONDS = 5.0  # that a caller has to say who it is
_BACKLOG = 1024
_GOODBYE = 5.0  # seconds of waiting for a peer to have read all


class Connections:
    """One rank's ends. Errors are OSErrors: TimeoutError where a peer is silent for too long, ConnectionError where it
    has gone."""

    def __init__(
        self,
        rank: int,
        ranks: int,
        host: str,
        timeout: float,
        tell: Callable[[str, str], None],
        ask: Callable[[str], bytes],
    ):
        """host: this rank's address, on which it listens until all have called. tell, ask: words that all ranks share;
        ask waits until somebody has told."""
        ends: dict[int, socket.socket] = {}
        listener = _listen(host)
        with listener:
            if rank == 0:
                tell("secret", secrets.token_hex(16))
            tell(f"address {rank}", f"{listener.getsockname()[1]} {host}")
            secret = ask("secret")
            for other in range(rank):
                port, _, address = ask(f"address {other}").decode().partition(" ")
                ends[other] = _call(address, int(port), timeout)
                ends[other].sendall(_HELLO.pack(secret, rank))
            deadline = time.monotonic() + timeout
            while len(ends) < ranks - 1:
                listener.settimeout(max(0.001, deadline - time.monotonic()))
                end, _ = listener.accept()
                if (caller := _caller(end, secret)) in range(rank + 1, ranks) and caller not in ends:
                    ends[caller] = end
                else:  # a stranger
                    end.close()
        self._ends = {other: _End(end, timeout) for other, end in ends.items()}

    def send(self, to: int, content: memoryview) -> None:
        """Begins to send; `content` must not change afterwards. From any thread."""
        self._ends[to].send([memoryview(_HEAD.pack(len(content))), content])

    def say_alive(self) -> None:
        """To everybody, between messages."""
        for end in self._ends.values():
            end.send([memoryview(_HEAD.pack(_ALIVE))])

    def receive(self, source: int, into: memoryview | None = None) -> memoryview:
        """The next message from `source`, into `into` where that is given: then of that length."""
        return self._ends[source].receive(into)

    def close(self) -> None:
        """Waits until all has been read that was sent, though not for long; then lets go."""
        for end in self._ends.values():
            end.finish()
        for end in self._ends.values():
            end.close()


class _End:
    """One end of a connection. One thread receives; any may send."""

    def __init__(self, connection: socket.socket, timeout: float):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setblocking(False)
        self._socket, self._timeout = connection, timeout
        self._readable, self._writable = select.poll(), select.poll()
        self._readable.register(connection, select.POLLIN)
        self._writable.register(connection, select.POLLOUT)
        self._rest: deque[memoryview] = deque()  # what the kernel has not taken yet
        self._changed = threading.Condition()  # of what follows, and of _rest
        self._problem: OSError | None = None
        self._writer: threading.Thread | None = None

    def send(self, parts: list[memoryview]) -> None:
        with self._changed:
            if self._problem is not None:
                raise self._problem
            if rest := parts if self._rest else self._write(parts):
                self._rest.extend(rest)
                self._changed.notify_all()
                if self._writer is None:
                    self._writer = threading.Thread(target=self._write_rest, name="writer", daemon=True)
                    self._writer.start()

    def receive(self, into: memoryview | None) -> memoryview:
        head = memoryview(bytearray(_HEAD.size))
        while (length := _HEAD.unpack(self._fill(head))[0]) == _ALIVE:
            pass
        if into is None and 0 <= length <= _MAX_BYTES:
            into = memoryview(bytearray(length))
        if into is None or len(into) != length:
            expected = f"at most {_MAX_BYTES}" if into is None else len(into)
            raise ConnectionError(
                f"sent {length} bytes in place of {expected}: do all run the same version and options?"
            )
        return self._fill(into)

    def finish(self) -> None:
        with self._changed, suppress(OSError):
            self._changed.wait_for(lambda: not self._rest or self._problem is not None, _GOODBYE)
            self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Reads to the end first: what lies unread would make the kernel throw away what the peer has not read yet."""
        deadline = time.monotonic() + _GOODBYE
        with suppress(OSError):
            while self._readable.poll(max(0.0, 1000 * (deadline - time.monotonic()))) and self._socket.recv(1 << 16):
                pass
        self._socket.close()

    def _fill(self, whole: memoryview) -> memoryview:
        rest = whole
        while len(rest):
            try:
                count = self._socket.recv_into(rest)
            except BlockingIOError:
                if not self._readable.poll(1000 * self._timeout):
                    raise TimeoutError(f"timed out: nothing has come in {self._timeout:g} s") from None
                continue
            if not count:
                raise ConnectionError("the connection is closed")
            rest = rest[count:]
        return whole

    def _write(self, parts: Sequence[memoryview]) -> list[memoryview]:
        """As much as the kernel takes now; gives the rest."""
        try:
            count = self._socket.sendmsg(parts)
        except BlockingIOError:
            count = 0
        rest = []
        for part in parts:
            if count < len(part):
                rest.append(part[count:])
            count = max(0, count - len(part))
        return rest

    def _write_rest(self) -> None:
        """The writer's thread. What it writes stays the first of the rest until it is written: nobody overtakes it."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._rest)
            try:
                if not self._writable.poll(1000 * self._timeout):
                    raise TimeoutError(f"timed out: nothing has been taken in {self._timeout:g} s")
                rest = self._write([self._rest[0]])
            except OSError as error:
                with self._changed:
                    self._problem = error
                    self._changed.notify_all()
                return
            with self._changed:
                self._rest.popleft()
                self._rest.extendleft(rest)
                self._changed.notify_all()


def _listen(host: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, 0), family=family, backlog=_BACKLOG)
    _enlarge(listener)  # those that it accepts have its buffers
    return listener


def _call(address: str, port: int, timeout: float) -> socket.socket:
    connection = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    _enlarge(connection)
    connection.settimeout(timeout)
    connection.connect((address, port))
    return connection


def _enlarge(end: socket.socket) -> None:
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        end.setsockopt(socket.SOL_SOCKET, option, _BUFFER)


def _caller(end: socket.socket, secret: bytes) -> int:
    """Who calls; -1 where it is none of us."""
    end.settimeout(_HELLO_SECONDS)
    hello = b""
    try:
        while len(hello) < _HELLO.size and (more := end.recv(_HELLO.size - len(hello))):
            hello += more
    except OSError:
        return -1
    told, rank = _HELLO.unpack(hello) if len(hello) == _HELLO.size else (b"", -1)
    return rank if hmac.compare_digest(told, secret) else -1
