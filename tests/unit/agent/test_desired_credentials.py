"""The credentials file: read as other tools write it, and only if nobody else can."""

import json

import pytest

from edgellm_agent.desired.base import SourceError
from edgellm_agent.desired.oci import SourceCredentials, read_credentials
from edgellm_agent.desired.sources import AllowList, parse_source

SECRET = "ZGV2aWNlOnNlY3JldA=="


@pytest.fixture
def write(tmp_path):
    def written(content, mode=0o600):
        path = tmp_path / "auth.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        path.chmod(mode)
        return path

    return written


def test_hosts_have_their_passwords(write):
    path = write({"auths": {"registry:5000": {"auth": SECRET}, "empty": {}}, "credHelpers": {}})
    assert read_credentials(path) == {"registry:5000": SECRET}


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660])
def test_a_file_that_others_can_read_is_refused(write, mode):
    with pytest.raises(SourceError, match="chmod 600") as error:
        read_credentials(write({"auths": {}}, mode))
    assert error.value.permanent


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"auths": 1}', '{"auths": {"h": 1}}', '{"auths": {"h": {"auth": "§"}}}']
)
def test_another_content_is_refused_and_not_shown(write, content):
    with pytest.raises(SourceError, match="is not as") as error:
        read_credentials(write(content))
    assert "§" not in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SourceError, match="No such file"):
        read_credentials(tmp_path / "auth.json")


@pytest.mark.parametrize(
    ("source", "header"),
    [("oci://registry:5000/e", f"Basic {SECRET}"), ("oci://registry/e", None), ("oci://other:5000/e", None)],
)
async def test_a_password_is_for_its_host_and_port(write, source, header):
    path = write({"auths": {"registry:5000": {"auth": SECRET}}})
    credentials = SourceCredentials(parse_source(source), AllowList([]), path)
    assert await credentials.header(None, ["Negotiate", 'Basic realm="x"']) == header


async def test_a_challenge_that_nobody_can_answer_has_no_answer(write):
    credentials = SourceCredentials(parse_source("oci://registry/e"), AllowList([]), None)
    assert await credentials.header(None, []) is None
    assert await credentials.header(None, ["", "Digest x", "Basic"]) is None
