"""What the authority issues is what other programs understand, and what it has issued is never forgotten."""

from __future__ import annotations

import subprocess
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from hypothesis import given
from hypothesis import strategies as st

from edgellm import paths
from edgellm.errors import EdgellmError
from edgellm.pki import certificates
from edgellm.pki.authority import Authority
from edgellm.pki.index import Index, Issued

NOW = datetime(2026, 3, 1, 12, tzinfo=timezone.utc)


class Clock:
    def __init__(self) -> None:
        self.time = NOW

    def __call__(self) -> datetime:
        return self.time

    def forward(self, days: float) -> None:
        self.time += timedelta(days=days)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def authority(tmp_path: Path, clock: Clock) -> Authority:
    return Authority.create(tmp_path / "pki", now=clock)


def read(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def extension(certificate: x509.Certificate, kind):
    return certificate.extensions.get_extension_for_class(kind).value


def openssl(authority: Authority, file: Path, *options: str, at: datetime = NOW) -> tuple[bool, str]:
    """What OpenSSL says of a certificate at a time, strictly, with the list of revoked ones."""
    command = ["openssl", "verify", "-x509_strict", "-check_ss_sig", "-attime", str(int(at.timestamp()))]
    command += ["-CAfile", str(authority.folder / "ca.pem"), *options, str(file)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=30)
    return done.returncode == 0, done.stdout + done.stderr


def test_a_client_has_a_name_and_a_role_and_may_not_serve(authority):
    holder = authority.issue_client("alice", "operator")
    certificate = read(holder.cert_file)
    assert certificate.subject.rfc4514_string() == "CN=alice"
    names = list(extension(certificate, x509.SubjectAlternativeName))
    assert names == [x509.UniformResourceIdentifier("urn:edgellm:role:operator")]
    assert openssl(authority, holder.cert_file, "-purpose", "sslclient")[0]
    assert not openssl(authority, holder.cert_file, "-purpose", "sslserver")[0]


def test_a_board_serves_under_its_name_and_is_a_client_of_the_broker_without_a_role(authority):
    holder = authority.issue_device("jetson-01", ["192.0.2.7", "jetson-01.local", "2001:db8::7", "jetson-01"])
    certificate = read(holder.cert_file)
    assert certificate.subject.rfc4514_string() == "CN=jetson-01"
    names = extension(certificate, x509.SubjectAlternativeName)
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["urn:edgellm:device"]
    assert names.get_values_for_type(x509.DNSName) == ["jetson-01", "jetson-01.local"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == [
        "192.0.2.7",
        "2001:db8::7",
    ]
    for purpose in ("sslclient", "sslserver"):
        accepted, said = openssl(
            authority, holder.cert_file, "-purpose", purpose, "-verify_hostname", "jetson-01"
        )
        assert accepted, said


def test_the_authority_signs_holders_and_lists_and_no_further_authority(authority):
    certificate = authority.certificate
    limits = extension(certificate, x509.BasicConstraints)
    assert (limits.ca, limits.path_length) == (True, 0)
    usage = extension(certificate, x509.KeyUsage)
    assert (usage.key_cert_sign, usage.crl_sign, usage.digital_signature) == (True, True, False)
    leaf = read(authority.issue_client("alice", "admin").cert_file)
    assert extension(leaf, x509.BasicConstraints).ca is False
    assert isinstance(leaf.public_key().curve, ec.SECP256R1)
    assert leaf.serial_number.bit_length() > 64


def test_validity_is_ten_years_397_days_and_90_days_unless_it_is_given(authority):
    def days(certificate: x509.Certificate) -> int:
        return (certificate.not_valid_after_utc - NOW).days

    assert days(authority.certificate) == 3650
    assert days(read(authority.issue_device("jetson-01").cert_file)) == 397
    assert days(read(authority.issue_client("alice", "app").cert_file)) == 90
    assert days(read(authority.issue_client("bob", "app", days=7).cert_file)) == 7
    # A board without a battery for its clock begins in the past.
    assert read(authority.folder / "bob.pem").not_valid_before_utc <= NOW - timedelta(hours=12)


def test_no_certificate_outlives_its_authority(tmp_path, clock):
    authority = Authority.create(tmp_path / "pki", days=30, now=clock)
    holder = authority.issue_client("alice", "app")
    assert holder.entry.not_after == authority.certificate.not_valid_after_utc
    clock.forward(31)
    with pytest.raises(EdgellmError, match="has expired"):
        authority.issue_client("bob", "app")
    assert not (tmp_path / "pki" / "bob.key").exists()


def test_keys_are_for_their_owner_alone(authority):
    authority.issue_client("alice", "app")
    assert authority.folder.stat().st_mode & 0o777 == 0o700
    for name in ("ca.key", "alice.key"):
        assert (authority.folder / name).stat().st_mode & 0o777 == 0o600


def test_a_revoked_certificate_is_in_the_list_that_the_authority_has_signed(authority):
    for name in ("alice", "bob"):
        authority.issue_client(name, "app")
    alice, bob = authority.folder / "alice.pem", authority.folder / "bob.pem"
    checked = ("-crl_check", "-CRLfile", str(authority.folder / "crl.pem"))
    assert openssl(authority, alice, *checked)[0]
    (revoked,) = authority.revoke("alice")
    assert revoked.serial == f"{read(alice).serial_number:x}"
    accepted, said = openssl(authority, alice, *checked)
    assert not accepted
    assert "certificate revoked" in said
    assert openssl(authority, bob, *checked)[0]


def test_revoking_a_name_revokes_also_what_was_issued_before_it_was_renewed(authority, clock):
    first = read(authority.issue_client("alice", "app").cert_file).serial_number
    clock.forward(30)
    second = read(authority.renew("alice").cert_file).serial_number
    authority.revoke("alice")
    listed = x509.load_pem_x509_crl((authority.folder / "crl.pem").read_bytes())
    assert {entry.serial_number for entry in listed} == {first, second}


def test_one_serial_number_is_revoked_and_no_other(authority):
    serial = authority.issue_client("alice", "app").entry.serial
    authority.renew("alice")
    (revoked,) = authority.revoke(f"0{serial.upper()}")
    assert revoked.serial == serial
    assert [state for _, state in authority.issued()] == ["revoked", "valid"]


def test_each_list_has_a_greater_number_and_a_date_for_the_next(authority, clock):
    def number() -> int:
        listed = x509.load_pem_x509_crl((authority.folder / "crl.pem").read_bytes())
        return listed.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number

    numbers = [number()]
    for change in (lambda: authority.issue_client("alice", "app"), lambda: authority.revoke("alice")):
        change()
        numbers.append(number())
    assert numbers == [1, 2, 3]
    assert authority.list_due() == NOW + timedelta(days=90)


def test_a_renewed_certificate_has_the_same_key_role_and_names_and_a_new_date(authority, clock):
    before = read(authority.issue_device("jetson-01", ["192.0.2.7"]).cert_file)
    key = (authority.folder / "jetson-01.key").read_bytes()
    clock.forward(300)
    holder = authority.renew("jetson-01")
    after = read(holder.cert_file)
    assert (authority.folder / "jetson-01.key").read_bytes() == key
    assert after.public_key() == before.public_key()
    assert after.serial_number != before.serial_number
    names = [extension(certificate, x509.SubjectAlternativeName) for certificate in (before, after)]
    assert names[0] == names[1]
    assert after.not_valid_after_utc == NOW + timedelta(days=300 + 397)


def test_a_holder_that_keeps_its_key_is_renewed_without_it(authority):
    holder = authority.issue_device("jetson-01")
    holder.key_file.unlink()
    assert authority.renew("jetson-01").key_file is None


def test_a_revoked_holder_is_not_renewed_and_gets_a_new_key(authority):
    authority.issue_client("alice", "app")
    before = (authority.folder / "alice.key").read_bytes()
    authority.revoke("alice")
    with pytest.raises(EdgellmError, match="was revoked"):
        authority.renew("alice")
    authority.issue_client("alice", "viewer")
    assert (authority.folder / "alice.key").read_bytes() != before
    assert [state for _, state in authority.issued()] == ["revoked", "valid"]


@pytest.mark.parametrize("name", ["alice", "ALICE"])
def test_a_name_is_given_once(authority, name):
    authority.issue_client("alice", "app")
    before = (authority.folder / "alice.pem").read_bytes()
    with pytest.raises(EdgellmError, match="alice has a certificate"):
        authority.issue_client(name, "admin")
    assert (authority.folder / "alice.pem").read_bytes() == before
    assert len(authority.issued()) == 1


def test_an_expired_name_is_free_again(authority, clock):
    authority.issue_client("alice", "app")
    clock.forward(91)
    authority.issue_client("alice", "viewer")
    assert [state for _, state in authority.issued()] == ["expired", "valid"]


def test_a_crash_between_index_and_file_leaves_nothing_unknown_and_nothing_in_the_way(authority, monkeypatch):
    whole = paths.write_atomically

    def crash(path: Path, data: bytes) -> None:
        if path.name == "alice.pem":
            raise OSError("power cut")
        whole(path, data)

    monkeypatch.setattr(paths, "write_atomically", crash)
    with pytest.raises(OSError, match="power cut"):
        authority.issue_client("alice", "app")
    assert [entry.name for entry, _ in authority.issued()] == ["alice"]
    monkeypatch.setattr(paths, "write_atomically", whole)
    authority.issue_client("alice", "app")
    # The one that nobody has is revoked with the other.
    assert len(authority.revoke("alice")) == 2


def test_files_of_somebody_else_are_not_overwritten(authority):
    (authority.folder / "alice.pem").write_text("precious")
    with pytest.raises(EdgellmError, match="not from this authority"):
        authority.issue_client("alice", "app")
    assert (authority.folder / "alice.pem").read_text() == "precious"


@pytest.mark.parametrize("name", ["", "ca", "CRL", "index", "a/b", "../a", "-x", "a b", "x" * 64])
def test_a_name_that_cannot_be_leaves_nothing_behind(authority, name):
    before = sorted(authority.folder.iterdir())
    with pytest.raises(EdgellmError, match="not a name"):
        authority.issue_client(name, "app")
    assert sorted(authority.folder.iterdir()) == before


@pytest.mark.parametrize("san", ["", "a b", "*.example", "http://x", "a..b", "é", "-", "x" * 64])
def test_a_malformed_name_of_a_board_leaves_nothing_behind(authority, san):
    with pytest.raises(EdgellmError, match="neither a host's name nor an address"):
        authority.issue_device("jetson-01", [san])
    assert not (authority.folder / "jetson-01.key").exists()
    assert authority.issued() == []


def test_an_unknown_role_is_refused(authority):
    with pytest.raises(EdgellmError, match="unknown role 'root'; there are viewer"):
        authority.issue_client("alice", "root")
    assert not (authority.folder / "alice.key").exists()


def test_an_encrypted_authority_signs_only_with_its_passphrase(tmp_path):
    Authority.create(tmp_path, passphrase="open sesame")
    with pytest.raises(TypeError, match="encrypted"):
        load_pem_private_key((tmp_path / "ca.key").read_bytes(), None)
    with pytest.raises(EdgellmError, match="is encrypted"):
        Authority(tmp_path).issue_client("alice", "app")
    with pytest.raises(EdgellmError, match="cannot be opened"):
        Authority(tmp_path, lambda: "open barley").issue_client("alice", "app")
    assert not (tmp_path / "alice.key").exists()
    Authority(tmp_path, lambda: "open sesame").issue_client("alice", "app")


def test_an_authority_is_not_made_over_another(authority):
    before = (authority.folder / "ca.key").read_bytes()
    with pytest.raises(EdgellmError, match="exists already"):
        Authority.create(authority.folder)
    assert (authority.folder / "ca.key").read_bytes() == before


def test_a_folder_without_an_authority_says_how_to_make_one(tmp_path):
    with pytest.raises(EdgellmError, match="no authority") as error:
        Authority(tmp_path)
    assert "pki init" in error.value.hint


def test_without_the_authoritys_key_nothing_is_signed(authority):
    (authority.folder / "ca.key").unlink()
    with pytest.raises(EdgellmError, match="only who has it can sign"):
        authority.issue_client("alice", "app")


def test_two_commands_do_not_work_in_a_folder_at_once(tmp_path, clock):
    Authority.create(tmp_path, passphrase="x", now=clock)

    def while_the_first_asks() -> str:
        with pytest.raises(EdgellmError, match="another command"):
            Authority(tmp_path, lambda: "x", clock).issue_client("bob", "app")
        return "x"

    first = Authority(tmp_path, while_the_first_asks, clock)
    first.issue_client("alice", "app")
    assert [entry.name for entry, _ in first.issued()] == ["alice"]


@pytest.mark.parametrize(
    "text", ["", "[]", '{"events": [{}]}', '{"events": [{"event": "forgotten"}]}', "\xff"]
)
def test_a_damaged_index_is_named(authority, text):
    (authority.folder / "index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(EdgellmError, match=r"index\.json cannot be read"):
        authority.issued()


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=12))
def test_the_index_only_grows_and_says_the_same_after_it_was_read_again(tmp_path_factory, steps):
    folder, index = tmp_path_factory.mktemp("index"), Index()
    for number, (name, revoked) in enumerate(steps):
        before = index.events
        if revoked:
            for entry in index.of(name):
                index = index.revoked(entry.serial, NOW)
        else:
            entry = Issued(f"{number + 1:x}f", name, "app", (), NOW, NOW + timedelta(days=1))
            index = index.issued(entry)
        assert index.events[: len(before)] == before
    index.save(folder)
    assert Index.load(folder).entries == index.entries


def test_roles_are_those_that_agents_know():
    # The agent's enum, in its order: each role may all that the ones before it may.
    from edgellm_agent.access.caller import Role

    assert tuple(str(role) for role in Role) == certificates.ROLES
