"""Channels over real ipc sockets: order, typed decoding, and frames that must not kill a receiver."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from vibe_sgl_lite.runtime.messages import AbortRequest, SchedulerInput, StopMatched, pack_ids, unpack_ids
from vibe_sgl_lite.runtime.transport.channels import Receiver, Sender


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield context
    context.destroy(linger=0)


def test_messages_arrive_in_order_and_typed(context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/s"
    sender = Sender(context, address)  # connecting before the receiver binds is fine
    receiver: Receiver[SchedulerInput] = Receiver(context, address, SchedulerInput)
    sent = [AbortRequest(uid=n) if n % 2 else StopMatched(uid=n) for n in range(100)]
    for message in sent:
        sender.send(message)
    got = [receiver.receive(5.0) for _ in sent]
    assert got == sent
    assert receiver.receive(0) is None


def test_what_a_connected_sender_sends_arrives_without_the_sockets_file(
    context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path
) -> None:
    address = f"ipc://{tmp_path}/s"
    receiver: Receiver[SchedulerInput] = Receiver(context, address, SchedulerInput, awaits_sender=True)
    assert not receiver.connected(0.05)
    sender = Sender(context, address)
    assert receiver.connected(30.0)
    assert receiver.connected(0.0)
    (tmp_path / "s").unlink()
    sender.send(AbortRequest(uid=3))
    assert receiver.receive(30.0) == AbortRequest(uid=3)
    receiver.close()


def test_bad_frames_are_counted_and_dropped(context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/s"
    receiver: Receiver[SchedulerInput] = Receiver(context, address, SchedulerInput)
    sender = Sender(context, address)
    good = AbortRequest(uid=1)
    whole = msgspec.msgpack.encode(good)
    bad = [b"", b"\x00", b"\xc1", whole[:-1], whole + b"\x00", b"\xa2\xff\xfe", msgspec.msgpack.encode(["Nobody", 1])]
    for frame in bad:
        sender.send_bytes(frame)
    sender.send(good)
    got = [receiver.receive(5.0) for _ in range(len(bad) + 1)]
    assert got == [None] * len(bad) + [good]
    assert receiver.bad_frames == len(bad)


def test_the_socket_file_is_private(context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path) -> None:
    Receiver[SchedulerInput](context, f"ipc://{tmp_path}/s", SchedulerInput)
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o600


def test_ids_pack_as_int32() -> None:
    ids = [0, 1, 151_935, 2**31 - 1]
    assert len(pack_ids(ids)) == 16
    assert unpack_ids(pack_ids(ids)) == ids
    with pytest.raises(ValueError, match="multiple"):
        unpack_ids(b"\x00" * 5)
