"""An engine that asks its clients for keys: who has them is served, who has not notices at once, and nobody else."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from tests.integration.daemon import Daemon
from vibe_sgl_lite import Client, ConnectError, SamplingParams
from vibe_sgl_lite.runtime.commands.main import main
from vibe_sgl_lite.runtime.transport.curve import make_keys

FEW = SamplingParams(max_new_tokens=4, temperature=0, ignore_eos=True)


def test_only_listed_clients_are_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = {name: str(tmp_path / name) for name in ("server", "known", "stranger")}
    for path in keys.values():
        assert main(["keygen", path]) == 0
    server, known, _ = capsys.readouterr().out.split()
    assert main(["keygen", keys["server"]]) == 2
    (tmp_path / "clients").write_text(f"{known} laptop\n")
    flags = ("--server-key", keys["server"], "--client-keys", str(tmp_path / "clients"), "--port", "0")
    with Daemon("--dtype", "float32", "--address", "tcp://127.0.0.1:0", *flags) as daemon:
        facts = daemon.wait_ready()
        address = facts["address"]
        assert facts["http"]  # the pipeline's own HTTP server is let in without
        with Client(address, server_key=server, client_key=keys["known"]) as client:
            expected = client.generate("Once upon a time", FEW).token_ids
            for name, arguments in {
                "no keys": {},
                "an unknown key": {"server_key": keys["server"] + ".pub", "client_key": keys["stranger"]},
                "another server's": {"server_key": keys["stranger"] + ".pub", "client_key": keys["known"]},
            }.items():
                with pytest.raises(ConnectError) as error:
                    Client(address, **arguments)  # type: ignore[arg-type]
                assert name != "an unknown key" or "asks for other keys" in str(error.value)
                assert client.generate("Once upon a time", FEW).token_ids == expected
        assert "keys that are not in" in daemon.log()
        assert daemon.stop() == 0


def test_a_bad_key_file_is_one_line(tmp_path: Path) -> None:
    make_keys(tmp_path / "server")
    flags = ("--address", "tcp://127.0.0.1:0", "--server-key", str(tmp_path / "server"))
    with Daemon(*flags, "--client-keys", str(tmp_path / "missing")) as daemon:
        assert daemon.wait_exit() == 2
        last = daemon.log().splitlines()[-1]
        assert last.startswith("error: tokenizer_manager: --client-keys")
        assert "Traceback" not in daemon.log()


def test_what_is_no_engine_is_told_at_once() -> None:
    """A web server, for one."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" + b" " * 100)
                connection.recv(1000)

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(ConnectError, match=r"is no engine, or asks for other keys|no engine answers"):
            Client(f"tcp://127.0.0.1:{listener.getsockname()[1]}")
