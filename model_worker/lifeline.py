"""Tells a rank that one of another node has died, while its main thread may wait for that one in a collective.

Gloo mostly ends a collective with an error when a peer's process dies, but not always: in one of some 400 kills an
all-reduce that had just begun waited on (torch 2.13); NCCL waits as a rule. So rank 0 and each rank of the other nodes
hold one plain TCP connection, on which nothing is sent but a farewell. Its end without one is the news. A machine that
is off or a cable that is cut ends no connection: that shows as silence, which the launchers look for.
"""

import contextlib
import selectors
import socket
import threading
from collections.abc import Callable, Sequence

from torch._C._distributed_c10d import Store

PORT_KEY = "lifeline"
FAREWELL = b"."
RANK_BYTES = 4
SAYS_S = 5.0  # in which whoever connects says who it is


class Lifeline:
    """Connections by the other's rank. lost: called once, in a thread, with the rank that ended without farewell."""

    def __init__(self, connections: dict[int, socket.socket], lost: Callable[[int], None]) -> None:
        self._connections = connections
        self._lost = lost
        threading.Thread(target=self._watch, name="lifeline", daemon=True).start()

    def say_farewell(self) -> None:
        """Before this rank ends as all of them do: its end is no loss then."""
        for connection in self._connections.values():
            with contextlib.suppress(OSError):  # that one has ended already
                connection.send(FAREWELL)

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for rank, connection in self._connections.items():
                selector.register(connection, selectors.EVENT_READ, rank)
            while selector.get_map():
                for key, _ in selector.select():
                    said = b""
                    with contextlib.suppress(OSError):  # a reset is an end too
                        said = self._connections[key.data].recv(1)
                    if said != FAREWELL:
                        self._lost(key.data)
                        return
                    selector.unregister(key.fileobj)


def hold_lifeline(
    store: Store, rank: int, others: Sequence[int], address: str, timeout_s: float, lost: Callable[[int], None]
) -> Lifeline:
    """Rank 0 and all of `others`, the ranks of the other nodes, call it together.

    address: rank 0's, on the interface that the nodes use. timeout_s: for the others to come; TimeoutError after it.
    """
    if rank != 0:
        port = int(store.get(PORT_KEY))
        connection = socket.create_connection((address, port), timeout_s)
        connection.sendall(rank.to_bytes(RANK_BYTES, "big"))
        connection.setblocking(True)
        return Lifeline({0: connection}, lost)
    connections: dict[int, socket.socket] = {}
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family, backlog=len(others)) as server:
        store.set(PORT_KEY, str(server.getsockname()[1]))
        while len(connections) < len(others):
            server.settimeout(timeout_s)
            connection = server.accept()[0]
            connection.settimeout(SAYS_S)
            number = -1
            with contextlib.suppress(OSError):  # it says nothing
                number = int.from_bytes(connection.recv(RANK_BYTES, socket.MSG_WAITALL), "big")
            if number in others and number not in connections:
                connection.setblocking(True)
                connections[number] = connection
            else:  # nobody of ours
                connection.close()
    return Lifeline(connections, lost)
