"""Names and addresses of a daemon: which are allowed. Where they lie is runtime/transport/rundir.py's matter."""

from __future__ import annotations

import ipaddress
import os
import re

from vibe_sgl_lite.runtime.errors import ConfigError

MAX_IPC_PATH = 103  # bytes; macOS has room for 104 with the closing zero, Linux for 108
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")


def check_name(name: str) -> None:
    """Raises ConfigError unless `name` can be a folder's name in the run directory."""
    if not NAME_PATTERN.fullmatch(name):
        raise ConfigError(
            f"--name {name!r}: must be 1 to 40 letters, digits, dots, dashes or underscores, "
            "starting with a letter or digit",
            field="name",
        )


def check_address(address: str, *, encrypted: bool = False) -> None:
    """Raises ConfigError unless `address` is ipc://PATH, or tcp://HOST:PORT on the loopback interface. encrypted: or
    anywhere, for CURVE guards it."""
    if address.startswith("ipc://"):
        try:
            path = os.path.abspath(address.removeprefix("ipc://"))
        except FileNotFoundError as error:
            raise ConfigError(
                f"--address {address}: give an absolute path, the current folder was removed", field="address"
            ) from error
        if address == "ipc://" or address.startswith("ipc://@"):
            raise ConfigError(f"--address {address}: give a file path after ipc://", field="address")
        if len(os.fsencode(path)) > MAX_IPC_PATH:
            raise ConfigError(
                f"--address {address}: the path has {len(os.fsencode(path))} bytes, a socket's path may have at most "
                f"{MAX_IPC_PATH}; choose a shorter one",
                field="address",
            )
        return
    host, _ = split_tcp(address)
    try:
        loopback = ipaddress.IPv4Address(host).is_loopback
    except ValueError as error:
        raise ConfigError(
            f"--address {address}: give the host as an IPv4 address, like 127.0.0.1", field="address"
        ) from error
    if not loopback and not encrypted:
        raise ConfigError(
            f"--address {address}: beyond loopback keys are needed: give --server-key and --client-keys where the "
            "engine runs, server_key and client_key where a client does; or use tcp://127.0.0.1:PORT or ipc://",
            field="address",
        )


def split_tcp(address: str) -> tuple[str, int]:
    """Host and port of tcp://HOST:PORT. Raises ConfigError for anything else."""
    host, colon, port = address.removeprefix("tcp://").rpartition(":")
    if not address.startswith("tcp://") or not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ConfigError(
            f"--address {address}: must be ipc://PATH or tcp://127.0.0.1:PORT (port 0 picks a free one)",
            field="address",
        )
    return host, int(port)


def split_host_port(address: str) -> tuple[str, int]:
    """("HOST", PORT) of --dist-init-addr; ConfigError when it is not HOST:PORT."""
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(
            f"--dist-init-addr {address} must be HOST:PORT, with node 0's address, like 10.0.0.1:29500",
            field="dist_init_addr",
        )
    return host.removeprefix("[").removesuffix("]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
