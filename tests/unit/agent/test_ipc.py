import asyncio
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm.v1 import worker_pb2
from edgellm_agent import ipc


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, ipc.WorkerChannel(theirs)


def ping():
    return worker_pb2.ToWorker(ping=worker_pb2.Ping())


def test_frames_that_come_in_pieces_are_put_together(pair):
    ours, channel = pair
    data = ipc.encode(worker_pb2.ToWorker(cancel=worker_pb2.Cancel(id=77))) + ipc.encode(ping())
    ours.sendall(data[:3])
    assert channel.receive(0) == []
    ours.sendall(data[3:-1])
    assert [m.cancel.id for m in channel.receive(1)] == [77]
    ours.sendall(data[-1:])
    assert channel.receive(1) == [ping()]


def test_polling_does_not_wait(pair):
    assert pair[1].receive(0) == []


def test_a_closed_channel_is_the_end(pair):
    ours, channel = pair
    ours.close()
    with pytest.raises(EOFError):
        channel.receive(None)


def test_a_length_beyond_the_bound_is_refused_before_memory_is_taken(pair):
    ours, channel = pair
    ours.sendall((ipc.MAX_FRAME_BYTES + 1).to_bytes(4, "big"))
    with pytest.raises(ipc.FrameError):
        channel.receive(1)


async def test_a_frame_that_is_no_message_is_a_frame_error_at_either_end(pair):
    ours, channel = pair
    frame = b"\x00\x00\x00\x02\x0a\x7f"
    ours.sendall(frame)
    with pytest.raises(ipc.FrameError, match="no message"):
        channel.receive(1)
    reader = asyncio.StreamReader()
    reader.feed_data(frame)
    with pytest.raises(ipc.FrameError, match="no message"):
        await ipc.read_from_worker(reader)


async def test_the_agent_reads_what_the_worker_sends():
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_unix_connection(sock=ours)
    with theirs:
        ipc.WorkerChannel(theirs).send(worker_pb2.FromWorker(drained=worker_pb2.Drained()))
        assert (await ipc.read_from_worker(reader)).WhichOneof("message") == "drained"
        theirs.sendall(b"\xff\xff\xff\xff")
        with pytest.raises(ipc.FrameError):
            await ipc.read_from_worker(reader)
    writer.close()
    await writer.wait_closed()


@given(st.binary(max_size=200))
def test_no_bytes_break_the_worker_other_than_by_an_error_it_expects(data):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(data)
        try:
            messages = ipc.WorkerChannel(theirs).receive(0)
        except ipc.FrameError:
            return
        assert all(isinstance(m, worker_pb2.ToWorker) for m in messages)
