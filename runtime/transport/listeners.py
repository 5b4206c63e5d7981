"""Who listens on a TCP port of this machine."""

from __future__ import annotations

import psutil


def who_listens(port: int) -> str:
    """For people: "process 123", or "another process" where that is another user's, whose sockets we may not see."""
    try:
        for connection in psutil.net_connections("tcp"):
            here = connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port
            if here and connection.pid is not None:
                return f"process {connection.pid}"
    except psutil.Error:
        pass  # macOS shows other processes' sockets to root alone
    return "another process"
