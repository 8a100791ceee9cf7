import pytest
from google.rpc import code_pb2, error_details_pb2

from edgellm.errors import DoesNotFitError
from edgellm_agent import errors
from edgellm_agent.services.status import to_status


def detail(status, kind):
    (packed,) = status.details
    message = kind()
    assert packed.Unpack(message)
    return message


def test_a_wrong_field_is_named():
    status = to_status(errors.InvalidError("sampling.top_p", "must be above 0"))
    assert status.code == code_pb2.INVALID_ARGUMENT
    assert detail(status, error_details_pb2.BadRequest).field_violations[0].field == "sampling.top_p"


@pytest.mark.parametrize(
    "error", [errors.TooLargeError("no", 10, 5), DoesNotFitError("no", needed_bytes=10, available_bytes=5)]
)
def test_what_does_not_fit_has_figures(error):
    status = to_status(error)
    assert status.code == code_pb2.RESOURCE_EXHAUSTED
    assert dict(detail(status, error_details_pb2.ErrorInfo).metadata) == {
        "needed_bytes": "10",
        "available_bytes": "5",
    }


@pytest.mark.parametrize(
    ("error", "code"),
    [(errors.BusyError("b", 1.5), "RESOURCE_EXHAUSTED"), (errors.UnavailableError("u", 1.5), "UNAVAILABLE")],
)
def test_what_may_work_later_says_when(error, code):
    status = to_status(error)
    assert code_pb2.Code.Name(status.code) == code
    assert detail(status, error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() == 1500


def test_an_unexpected_error_tells_nothing_of_its_inside():
    status = to_status(KeyError("secret"))
    assert status.code == code_pb2.INTERNAL
    assert "secret" not in status.message


def test_every_agent_error_has_a_code_of_its_own():
    kinds = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, errors.AgentError)]
    arguments = {
        errors.InvalidError: ("f", "m"),
        errors.TooLargeError: ("m", 1, 2),
        errors.OffsetError: ("sha256:a", 1),
    }
    for kind in set(kinds) - {errors.AgentError, errors.EngineError}:
        assert to_status(kind(*arguments.get(kind, ("m",)))).code != code_pb2.INTERNAL, kind
