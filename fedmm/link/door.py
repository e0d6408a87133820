"""The link's port: how many connections stand there, and for how long before they show a token.

A connection is unproven until a session on it is admitted. gRPC bounds the number of all connections, and nothing by
address: one machine's bare connections would fill it. So a thread looks at this process's own sockets and cuts

- an unproven connection after `UNPROVEN_SECONDS`;
- while more than `room` are unproven, the oldest one of the machine that has most of them.

The oldest one, because an honest client shows its token within a few round trips, and may share its address with an
attacker. A connection with a session is never cut here.

A proxy in front that counts before it passes bytes on was measured instead: 88 MB each way over TLS took 19% longer.
"""

from __future__ import annotations

import logging
import socket
import stat
import threading
import time
from collections import Counter, defaultdict
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path
from urllib.parse import unquote

log = logging.getLogger("fedmm.host")
UNPROVEN_SECONDS = 10.0  # a handshake and a token are four round trips
ROOM = 32  # unproven connections, at least
STREAMS = 4  # of one connection at once; a session is one
TICK_SECONDS, BUSY_TICK_SECONDS = 0.1, 0.01
_DESCRIPTORS = Path("/dev/fd")  # this process's own, on Linux and macOS

Peer = tuple[IPv4Address | IPv6Address, int]


def room(sessions: int) -> int:
    """Unproven connections that a host of so many sessions bears: all its clients may come at once."""
    return max(ROOM, sessions)


def connections(sessions: int) -> int:
    """The most connections of a host with so many sessions: between two looks, `room` more may arrive."""
    return sessions + 2 * room(sessions)


class Door:
    """Watches the connections to `port` from construction until `close`."""

    def __init__(self, port: int, room: int) -> None:
        self._port, self._room = port, room
        self._lock = threading.Lock()  # over a look and its cuts: a session is admitted before them or after them
        self._proven: Counter[Peer] = Counter()
        self._since: dict[Peer, float] = {}
        self._peers: dict[int, Peer | None] = {}  # by inode; None: another socket than those at the port
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="fedmm-door", daemon=True)
        self._thread.start()

    def prove(self, peer: str) -> None:
        """A session has been admitted on this connection, named as gRPC names it."""
        with self._lock:
            self._proven[_read(peer)] += 1

    def leave(self, peer: str) -> None:
        """A session on this connection has ended."""
        with self._lock:
            self._proven -= Counter([_read(peer)])

    def close(self) -> None:
        """Stop watching; safe to repeat."""
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        crowded = False
        while not self._closed.wait(BUSY_TICK_SECONDS if crowded else TICK_SECONDS):
            try:
                with self._lock:
                    crowded = self._look(time.monotonic())
            except OSError as error:  # no descriptor is left to list descriptors with
                log.warning("the port is not watched for now: %s", error)
                self._closed.wait(UNPROVEN_SECONDS)

    def _look(self, now: float) -> bool:
        """Cut what must go; returns whether there were too many."""
        here = self._connections()
        self._since = {peer: now if peer in self._proven else self._since.get(peer, now) for peer in here}
        machines: dict[object, list[Peer]] = defaultdict(list)
        late, count = [], 0
        for peer in sorted(here.keys() - self._proven.keys(), key=self._since.__getitem__):
            if now - self._since[peer] > UNPROVEN_SECONDS:
                late.append(peer)
            else:
                machines[machine_of(peer[0])].append(peer)
                count += 1
        crowd = [max(machines.values(), key=len).pop(0) for _ in range(count - self._room)]
        for peer in (*late, *crowd):
            _cut(here[peer], peer)
        if crowd:
            log.debug("the port is crowded: %d of %d unproven connections are cut", len(crowd), count)
        return bool(crowd)

    def _connections(self) -> dict[Peer, int]:
        """The connections to the port, with their descriptors."""
        sockets = _sockets()
        self._peers = {
            inode: self._peers[inode] if inode in self._peers else _peer_at(self._port, descriptor)
            for inode, descriptor in sockets.items()
        }
        return {peer: sockets[inode] for inode, peer in self._peers.items() if peer is not None}


def _sockets() -> dict[int, int]:
    """Descriptors of this process's sockets, by inode."""
    found = {}
    for path in _DESCRIPTORS.iterdir():
        try:
            about = path.stat()
        except OSError:  # closed since it was listed
            continue
        if stat.S_ISSOCK(about.st_mode):
            found[about.st_ino] = int(path.name)
    return found


def _peer_at(port: int, descriptor: int) -> Peer | None:
    """Who is connected to `port` on this socket; None where it is another kind of socket."""
    try:
        opened = socket.socket(fileno=descriptor)
    except OSError:  # closed since it was listed
        return None
    try:
        inet = opened.family in (socket.AF_INET, socket.AF_INET6) and opened.getsockname()[1] == port
        return _peer(*opened.getpeername()[:2]) if inet else None
    except OSError:  # the port's own listening socket, or one that the peer has left
        return None
    finally:
        opened.detach()  # it is gRPC's to close


def _cut(descriptor: int, peer: Peer) -> None:
    """Shut the connection with `peer` down, if this descriptor is still its; gRPC then closes it."""
    try:
        opened = socket.socket(fileno=descriptor)
    except OSError:  # closed by now
        return
    try:
        if _peer(*opened.getpeername()[:2]) == peer:
            opened.shutdown(socket.SHUT_RDWR)
    except OSError:  # the peer has left
        return
    finally:
        opened.detach()


def _read(peer: str) -> Peer:
    """gRPC's name of a connection's other end: ipv4:127.0.0.1:5000, ipv6:%5B::1%5D:5000."""
    host, _, port = unquote(peer).partition(":")[2].rpartition(":")
    return _peer(host.strip("[]"), int(port))


def _peer(host: str, port: int) -> Peer:
    return address_of(host), port


def address_of(host: str) -> IPv4Address | IPv6Address:
    """The address that a socket gives as text; one of IPv4 in IPv6's form is of IPv4."""
    address = ip_address(host.partition("%")[0])
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address


def machine_of(address: IPv4Address | IPv6Address) -> object:
    """What may be one machine: an IPv6 machine has a network of 2^64 addresses to itself."""
    return ip_network((address, 64), strict=False) if isinstance(address, IPv6Address) else address
