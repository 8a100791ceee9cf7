"""Whose share of the engine's time a request takes."""

from types import SimpleNamespace

import pytest

from edgellm.v1 import inference_pb2
from edgellm_agent import errors
from edgellm_agent.access.caller import Caller, Role, begin
from edgellm_agent.http.guard import CALLER
from edgellm_agent.services.inference import InferenceServicer


class Engine:
    """Takes the client's name, and nothing else."""

    def submit(self, _request, _deadline_s, client):
        self.client = client
        raise errors.BusyError("enough seen")


class Context(SimpleNamespace):
    def time_remaining(self):
        return None

    def invocation_metadata(self):
        return self.metadata

    def peer(self):
        return "ipv4:127.0.0.1:5"

    async def abort_with_status(self, status):
        raise AssertionError(status.details)


async def client_of(name, *metadata):
    engine = Engine()
    servicer = InferenceServicer(SimpleNamespace(engine_for=lambda _: engine))
    begin(Caller(name, Role.APP))
    with pytest.raises(AssertionError, match="enough seen"):
        async for _ in servicer.Generate(inference_pb2.GenerateRequest(), Context(metadata=metadata)):
            pass
    return engine.client


async def test_a_callers_clients_are_told_apart_by_the_names_they_give():
    arm, legs = [await client_of("uid 7", ("edgellm-client", name)) for name in ("arm", "legs")]
    assert arm != legs
    assert await client_of("uid 7", ("edgellm-client", "arm")) == arm


async def test_nobody_takes_anothers_share_by_its_name():
    name = ("edgellm-client", "arm")
    assert await client_of("uid 7", name) != await client_of("uid 8", name)
    assert not (await client_of("http-like", name)).startswith("http:")


async def test_without_a_name_all_clients_of_a_caller_are_one():
    assert await client_of("uid 7") == await client_of("uid 7", ("other", "x"))
    assert await client_of("uid 7") != await client_of("uid 8")


def test_http_is_an_app():
    assert Caller("http", Role.APP) == CALLER
