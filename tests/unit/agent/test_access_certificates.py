"""What clients' certificates say, and files that are renewed under a running agent."""

import pytest

from edgellm_agent.access.caller import Caller, Role
from edgellm_agent.access.certificates import Certificates
from edgellm_agent.access.renewed import Renewed
from edgellm_agent.errors import UnauthenticatedError
from tests.support.access_pki import DAY, DeviceAuthority, now


@pytest.fixture
def authority(tmp_path):
    return DeviceAuthority(tmp_path / "pki")


@pytest.fixture
def certificates(authority):
    return Certificates(authority.settings(authority.device()))


class TestHolder:
    @pytest.mark.parametrize("role", list(Role))
    def test_the_name_is_the_common_name_and_the_role_is_in_the_uri(self, authority, certificates, role):
        files = authority.client("alice", str(role))
        assert certificates.caller(files.pem) == Caller("certificate alice", role)

    @pytest.mark.parametrize(
        "roles", [(), ("admin", "viewer"), ("viewer", "viewer"), ("root",), ("",), ("Admin",)]
    )
    def test_anything_but_exactly_one_known_role_is_refused(self, authority, certificates, roles):
        files = authority.client("alice", *roles)
        with pytest.raises(UnauthenticatedError, match="must have one URI urn:edgellm:role:ROLE") as error:
            certificates.caller(files.pem)
        assert "edgellm pki issue" in error.value.hint

    def test_a_devices_certificate_is_no_clients(self, authority, certificates):
        with pytest.raises(UnauthenticatedError, match="must have one URI"):
            certificates.caller(authority.device().pem)

    @pytest.mark.parametrize("name", ["a\nb", "ä", "a\x00"])
    def test_a_name_that_would_spoil_the_log_is_refused(self, authority, certificates, name):
        files = authority.client("x", "viewer")
        bad = authority.client_named(name, "viewer")
        assert certificates.caller(files.pem).name == "certificate x"
        with pytest.raises(UnauthenticatedError, match="common name"):
            certificates.caller(bad)

    def test_what_is_no_certificate_is_refused(self, certificates):
        with pytest.raises(UnauthenticatedError, match="cannot be read"):
            certificates.caller(b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")

    def test_one_that_ended_while_its_connection_was_open_is_refused(self, authority, certificates):
        files = authority.client("alice", "viewer", begins=now() - 2 * DAY, expires=now() - DAY)
        with pytest.raises(UnauthenticatedError, match="certificate alice has expired"):
            certificates.caller(files.pem)


class TestRevocation:
    def test_a_revoked_one_is_refused_as_soon_as_the_list_says_so(self, authority):
        alice, bob = authority.client("alice", "admin"), authority.client("bob", "admin")
        certificates = Certificates(authority.settings(authority.device(), authority.revoke()))
        assert certificates.caller(alice.pem).role is Role.ADMIN
        authority.revoke(alice)
        with pytest.raises(UnauthenticatedError, match="certificate alice has been revoked"):
            certificates.caller(alice.pem)
        assert certificates.caller(bob.pem).role is Role.ADMIN

    def test_a_list_of_another_authority_of_the_same_name_does_not_count(self, authority, tmp_path):
        alice = authority.client("alice", "admin")
        foreign = DeviceAuthority(tmp_path / "foreign")
        settings = authority.settings(authority.device(), authority.revoke(alice))
        certificates = Certificates(settings)
        foreign.revoke().replace(authority.crl_file)
        with pytest.raises(UnauthenticatedError, match="revoked"):
            certificates.caller(alice.pem)

    def test_a_list_that_nobody_signed_does_not_start(self, authority, tmp_path):
        foreign = DeviceAuthority(tmp_path / "foreign")
        with pytest.raises(ValueError, match="signed by no authority"):
            Certificates(authority.settings(authority.device(), foreign.revoke()))

    def test_a_list_that_goes_away_stays_in_force(self, authority, caplog):
        alice = authority.client("alice", "admin")
        certificates = Certificates(authority.settings(authority.device(), authority.revoke(alice)))
        authority.crl_file.unlink()
        with pytest.raises(UnauthenticatedError, match="revoked"):
            certificates.caller(alice.pem)
        assert "crl_file" in caplog.text

    def test_an_old_list_counts_and_is_told(self, authority, caplog):
        alice = authority.client("alice", "admin")
        crl = authority.revoke(alice, due=now() - DAY)
        certificates = Certificates(authority.settings(authority.device(), crl))
        with pytest.raises(UnauthenticatedError, match="revoked"):
            certificates.caller(alice.pem)
        assert "access.old_revocations" in caplog.text

    def test_two_authorities_have_a_list_each(self, authority, tmp_path):
        other = DeviceAuthority(tmp_path / "other", "another authority")
        both = tmp_path / "both.pem"
        both.write_bytes(authority.ca_file.read_bytes() + other.ca_file.read_bytes())
        alice, bob = authority.client("alice", "admin"), other.client("bob", "admin")
        lists = tmp_path / "lists.pem"
        lists.write_bytes(authority.revoke(alice).read_bytes() + other.revoke(bob).read_bytes())
        settings = authority.settings(authority.device(), lists).model_copy(update={"ca_file": both})
        certificates = Certificates(settings)
        for files in (alice, bob):
            with pytest.raises(UnauthenticatedError, match="revoked"):
                certificates.caller(files.pem)


class TestFiles:
    @pytest.mark.parametrize("name", ["ca_file", "cert_file", "key_file", "crl_file"])
    @pytest.mark.parametrize("content", [None, b"", b"no PEM"])
    def test_a_file_of_no_use_is_named_at_the_start(self, authority, tmp_path, name, content):
        bad = tmp_path / "bad.pem"
        if content is not None:
            bad.write_bytes(content)
        settings = authority.settings(authority.device()).model_copy(update={name: bad})
        with pytest.raises(ValueError, match=f"tls .*{name}.*bad.pem"):
            Certificates(settings)

    def test_a_key_of_another_certificate_is_refused(self, authority):
        settings = authority.settings(authority.device())
        other = settings.model_copy(update={"key_file": authority.device().key_file})
        with pytest.raises(ValueError, match="cannot be used"):
            Certificates(other)


class TestRenewed:
    @pytest.fixture
    def file(self, tmp_path):
        path = tmp_path / "file"
        path.write_text("1")
        return path

    def load(self, file):
        self.loads = getattr(self, "loads", 0) + 1
        return int(file.read_text())

    def write(self, file, text):
        new = file.with_suffix(".new")
        new.write_text(text)
        new.replace(file)

    def test_a_file_is_read_again_when_it_changes_and_only_then(self, file):
        renewed = Renewed([file], lambda: self.load(file))
        assert [renewed.get() for _ in range(3)] == [1, 1, 1]
        self.write(file, "2")
        assert [renewed.get() for _ in range(3)] == [2, 2, 2]
        assert self.loads == 2

    def test_a_bad_one_is_told_once_and_the_old_value_stays_until_a_good_one_comes(self, file, caplog):
        renewed = Renewed([file], lambda: self.load(file))
        self.write(file, "no number")
        assert [renewed.get() for _ in range(3)] == [1, 1, 1]
        assert caplog.text.count("access.files_not_renewed") == 1
        self.write(file, "3")
        assert renewed.get() == 3

    def test_one_that_is_away_for_a_moment_does_no_harm(self, file):
        renewed = Renewed([file], lambda: self.load_or_raise(file))
        file.unlink()
        assert renewed.get() == 1
        file.write_text("4")
        assert renewed.get() == 4

    def load_or_raise(self, file):
        try:
            return self.load(file)
        except OSError as error:
            raise ValueError(str(error)) from None
