"""What torchrun or Open MPI tell a process that they have started, and how it ends when they are gone."""

from __future__ import annotations

import fcntl
import ipaddress
import os
import signal
import socket
import struct
import sys
import threading
import time
from contextlib import suppress

from maestrale.errors import UsageError

_LOOK = 1.0  # seconds between looks at the parent
_SIOCGIFADDR = 0x8915  # Linux: an interface's IPv4 address
_LAUNCHERS = {"TORCHELASTIC_RUN_ID", "OMPI_COMM_WORLD_SIZE"}  # one of these says that the parent is one


def world() -> tuple[int, int, int]:
    """(rank, ranks, rank on this host) as torchrun or Open MPI tell; (0, 1, 0) alone."""
    for rank, size, local in (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ):
        if size in os.environ:
            try:
                told = int(os.environ[rank]), int(os.environ[size]), int(os.environ[local])
            except (KeyError, ValueError):
                raise UsageError(f"{rank}, {size} and {local} must all be whole numbers: start with torchrun") from None
            if not (0 <= told[0] < told[1] and 0 <= told[2] < told[1]):
                raise UsageError(
                    f"{rank}={told[0]}, {size}={told[1]}, {local}={told[2]}: ranks go from 0 to {size} - 1: "
                    "start with torchrun"
                )
            return told
    return 0, 1, 0


def ranks_on_this_host() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") or 1)


def hush_torch() -> None:
    """A rank that finds no other: torch tells it in pages of frames, we in a line. Before torch is imported."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")


def set_rendezvous(size: int) -> None:
    """MASTER_ADDR and MASTER_PORT: where the ranks meet. Open MPI starts processes but says no address; on one host it
    is this one. UsageError where nobody says any."""
    if "OMPI_COMM_WORLD_SIZE" in os.environ and "MASTER_ADDR" not in os.environ:
        _set_address_under_mpirun(size)
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if not address or not (port.isdecimal() and 0 < int(port) < 1 << 16):
        raise UsageError(
            f"MASTER_ADDR={address or ''}, MASTER_PORT={port}: expected an address of rank 0's host and a port: "
            "start with torchrun"
        )


def _set_address_under_mpirun(size: int) -> None:
    if os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") != str(size):
        raise UsageError("several hosts under mpirun: set MASTER_ADDR and MASTER_PORT to an address of rank 0's host")
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    # Two jobs on one host must not meet: a port from the job's own number.
    job = os.environ.get("PMIX_NAMESPACE", "0")
    os.environ.setdefault("MASTER_PORT", str(20_000 + sum(map(ord, job)) * 31 % 20_000))


def own_address() -> str:
    """The address by which other ranks reach this host: of the interface that GLOO_SOCKET_IFNAME names, else of the one
    on the way to rank 0's host. UsageError where that is no other host's way."""
    if sys.platform == "linux" and (name := os.environ.get("GLOO_SOCKET_IFNAME")):
        request = struct.pack("256s", name.split(",")[0].encode()[:15])
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked, suppress(OSError):  # it may have IPv6 only
            return socket.inet_ntoa(fcntl.ioctl(asked, _SIOCGIFADDR, request)[20:24])
    try:
        family, *_, place = socket.getaddrinfo(os.environ["MASTER_ADDR"], 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as way:
            way.connect(place)
            address = str(way.getsockname()[0])
    except OSError as error:
        raise UsageError(f"MASTER_ADDR={os.environ['MASTER_ADDR']}: {error}") from None
    if ranks_on_this_host() < world()[1] and ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        raise UsageError(
            f"{socket.gethostname()}: its name means {address}, which other hosts cannot reach: set GLOO_SOCKET_IFNAME "
            "to the interface that they reach"
        )
    return address


def end_with_launcher() -> None:
    """From now on this process ends when its launcher does, even by SIGKILL: rank 0 as by SIGTERM, which lets a server
    close its streams, the others at once. A process that was started by hand may outlive its shell."""
    if _LAUNCHERS & set(os.environ):
        threading.Thread(target=_watch, args=(os.getppid(),), name="launcher", daemon=True).start()


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(_LOOK)
    os.kill(os.getpid(), signal.SIGKILL if world()[0] else signal.SIGTERM)
