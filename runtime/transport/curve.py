"""CURVE, ZeroMQ's encryption, for TCP beyond this machine: who listens and who connects know each other's public keys.

`vibe-sgl-lite keygen FILE` makes a pair: FILE with both keys, to be kept, and FILE.pub with the public one, to be given
away. Without a handler of ZeroMQ's authentication protocol (https://rfc.zeromq.org/spec/27/) CURVE takes any client's
key, and without a domain to enforce it goes on when the handler is gone; `AllowList` is the handler, `serve` sets the
domain.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import msgspec
import zmq
from zmq.utils import z85

from vibe_sgl_lite.runtime.errors import ConfigError

KEY_CHARS = 40  # 32 bytes in Z85
ZAP_ADDRESS = "inproc://zeromq.zap.01"
ZAP_DOMAIN = b"api"
HANDSHAKE_MS = 5000  # a connection that has not proved its key by then is closed
LISTED_AT_MOST = 100_000

log = logging.getLogger(__name__)


class Keys(msgspec.Struct, frozen=True):
    """A pair, in Z85."""

    public: bytes
    secret: bytes


class ClientKeys(msgspec.Struct, frozen=True):
    """What a client needs: the server's public key and its own pair."""

    server: bytes
    own: Keys

    def use(self, socket: zmq.Socket[bytes]) -> None:
        """Before it connects."""
        socket.curve_serverkey = self.server
        socket.curve_publickey, socket.curve_secretkey = self.own.public, self.own.secret


def make_keys(path: Path) -> str:
    """Write a new pair to `path` (0600) and its public key to `path`.pub; returns the public key. Never overwrites.

    Raises ConfigError.
    """
    public, secret = (key.decode() for key in zmq.curve_keypair())
    try:
        for file, text, mode in (
            (path, f"# the secret key of an engine or a client: keep it\npublic {public}\nsecret {secret}\n", 0o600),
            (path.with_name(path.name + ".pub"), f"{public}\n", 0o644),
        ):
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
            with open(descriptor, "w") as opened:
                opened.write(text)
    except OSError as error:
        raise ConfigError(f"{error.filename}: no key can be written: {error.strerror}; choose another file") from error
    return public


def read_keys(path: str, field: str) -> Keys:
    """The pair in a file of `make_keys`. Raises ConfigError, naming `field`."""
    words = dict(line.split(maxsplit=1) for line in _lines(path, field) if len(line.split()) == 2)
    pair = [words.get(name, "").strip() for name in ("public", "secret")]
    if not all(map(_is_key, pair)) or zmq.curve_public(pair[1].encode()).decode() != pair[0]:
        raise ConfigError(f"{field}: {path} holds no pair of keys; make one with `vibe-sgl-lite keygen`", field=field)
    return Keys(pair[0].encode(), pair[1].encode())


def read_public(text: str, field: str) -> bytes:
    """A public key, given as it is or as the name of the file that holds it. Raises ConfigError, naming `field`."""
    if _is_key(text):
        return text.encode()
    found = [line for line in _lines(text, field) if _is_key(line)]
    if len(found) != 1:
        raise ConfigError(f"{field}: {text} is neither a public key nor a file with one", field=field)
    return found[0].encode()


def client_keys(address: str, server_key: str | None, client_key: str | None) -> ClientKeys | None:
    """Of a client's two arguments: both or none, and for TCP. Raises ConfigError."""
    if server_key is None and client_key is None:
        return None
    if server_key is None or client_key is None or not address.startswith("tcp://"):
        raise ConfigError("server_key and client_key go together, with an address tcp://HOST:PORT", field="server_key")
    return ClientKeys(read_public(server_key, "server_key"), read_keys(os.fspath(client_key), "client_key"))


class AllowList:
    """Answers ZeroMQ's questions about who connects, in this context. socket: to be polled, and `answer` to be called.

    path: a file with a public key a line, more words behind it are ignored, as are lines that begin with #. It is read
    anew when it has changed; when it cannot be read any more, nobody is let in. Raises ConfigError at first.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], path: str) -> None:
        self.refused_total = 0
        self._path = path
        self._changed: tuple[int, int] | None = None
        self._keys: frozenset[bytes] = frozenset()
        self._read()
        self.socket = context.socket(zmq.REP)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind(ZAP_ADDRESS)

    def serve(self, socket: zmq.Socket[bytes], keys: Keys) -> None:
        """What `socket` binds from now on is for listed clients alone; what it has bound before stays as it was."""
        socket.curve_secretkey, socket.curve_publickey = keys.secret, keys.public
        socket.curve_server = True
        socket.setsockopt(zmq.ZAP_DOMAIN, ZAP_DOMAIN)
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)

    def answer(self) -> None:
        while True:
            try:
                parts = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            allowed = len(parts) == 7 and parts[5] == b"CURVE" and self._allows(z85.encode(parts[6]))
            if not allowed:
                self.refused_total += 1
                if self.refused_total == 1 or self.refused_total % 1000 == 0:
                    log.warning("%d connections with keys that are not in %s", self.refused_total, self._path)
            status = (b"200", b"OK") if allowed else (b"400", b"this key is not known here")
            self.socket.send_multipart([b"1.0", parts[1] if len(parts) > 1 else b"", *status, b"", b""])

    def close(self) -> None:
        self.socket.close()

    def _allows(self, key: bytes) -> bool:
        try:
            self._read()
        except ConfigError as error:
            log.error("nobody can connect: %s", error)
            return False
        return key in self._keys

    def _read(self) -> None:
        try:
            info = os.stat(self._path)
        except OSError as error:
            self._changed = None
            raise ConfigError(f"--client-keys {self._path}: {error.strerror}", field="client_keys") from error
        if self._changed == (info.st_mtime_ns, info.st_size):
            return
        lines = [line.split()[0] for line in _lines(self._path, "--client-keys")]
        odd = next((line for line in lines if not _is_key(line)), None)
        if odd is not None or len(lines) > LISTED_AT_MOST:
            text = f"--client-keys {self._path}: each line must begin with a public key of {KEY_CHARS} characters"
            raise ConfigError(text, field="client_keys")
        self._keys = frozenset(line.encode() for line in lines)
        self._changed = info.st_mtime_ns, info.st_size


def _is_key(text: str) -> bool:
    try:
        return len(text) == KEY_CHARS and len(z85.decode(text)) == 32
    except (ValueError, KeyError, UnicodeEncodeError):
        return False


def _lines(path: str, field: str) -> list[str]:
    try:
        text = Path(path).read_text(encoding="ascii")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{field}: {path} cannot be read: {error}", field=field) from error
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("# ") and line != "#"]
