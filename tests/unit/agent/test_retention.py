"""Which attestations a device keeps: the rule of `trust/retention.py`, and what it must never change."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm.bundle.referrers import MAX_ATTESTATIONS
from edgellm.signing import Envelope, Statement, times
from edgellm.signing.dsse import PAYLOAD_TYPE, Signature
from edgellm.signing.statements import PROVENANCE_TYPE
from edgellm.signing.verification import Expected, Keyring, judge
from edgellm_agent.errors import UntrustedError
from edgellm_agent.trust.retention import retained
from edgellm_agent.trust.verify import endorsement
from tests.support.signing import DAY_S, NOW_S, Signer, release_envelope

ENGINE = "sha256:" + "ab" * 32
SIGNER, OTHER, STRANGER, REVOKED = (Signer.make(name) for name in ("release", "other", "stranger", "old"))
KEYS = Keyring((SIGNER.public, OTHER.public), (REVOKED.public,))
EXPECTED = Expected(ENGINE, "tiny-int4", "orin-nano-8gb", NOW_S)


def note(text, kind=PROVENANCE_TYPE, digest=ENGINE):
    return Envelope(Statement("tiny-int4", digest, kind, {"text": text}).to_json())


def unsigned(text, kind=PROVENANCE_TYPE):
    return note(text, kind).to_json()


def signed(text, kind=PROVENANCE_TYPE, by=SIGNER):
    return note(text, kind).signed(by.private).to_json()


def forged(envelope, key_id=SIGNER.public.key_id):
    return Envelope(envelope.payload, PAYLOAD_TYPE, (Signature(key_id, b"\0" * 64),)).to_json()


def kept(stored, *arrived, keys=KEYS, expected=EXPECTED):
    return retained(stored, arrived, keys, expected)


def test_of_unsigned_notes_of_one_type_the_last_is_kept():
    assert kept([unsigned("1")], unsigned("2"), unsigned("3")) == [unsigned("3")]
    assert kept([unsigned("1")], unsigned("1", "urn:b")) == [unsigned("1"), unsigned("1", "urn:b")]


def test_what_comes_again_is_the_last_again():
    assert kept([unsigned("1"), unsigned("1", "urn:b")], unsigned("1")) == [
        unsigned("1", "urn:b"),
        unsigned("1"),
    ]


def test_of_what_a_key_signed_of_one_type_the_last_is_kept():
    assert kept([signed("1")], signed("2")) == [signed("2")]
    assert kept([signed("1")], signed("2", by=OTHER)) == [signed("1"), signed("2", by=OTHER)]


def test_an_unsigned_note_takes_the_place_of_no_signed_one():
    assert kept([signed("1")], unsigned("2"), forged(note("3"))) == [
        signed("1"),
        unsigned("2"),
        forged(note("3")),
    ]


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ({"release": 8}, {"release": 7, "issued": times.to_text(NOW_S - 1)}),
        ({"issued": times.to_text(NOW_S - 1)}, {"issued": times.to_text(NOW_S - 2)}),
        ({}, {"release": 9, "expires": times.to_text(NOW_S)}),
        ({}, {"release": 9, "profiles": ["agx-thor"]}),
        ({}, {"release": 9, "name": "other"}),
    ],
)
def test_of_a_key_s_releases_the_best_is_kept_whichever_comes_first(better, worse):
    good, bad = SIGNER.release(ENGINE, **better), SIGNER.release(ENGINE, **worse)
    assert kept([good], bad) == kept([bad], good) == [good]


def test_a_release_that_cannot_be_read_displaces_none_though_the_key_signed_it():
    payload = Statement("tiny-int4", ENGINE, "urn:edgellm:release:v1", {"release": 99}).to_json()
    release = SIGNER.release(ENGINE)
    assert kept([release], Envelope(payload).signed(SIGNER.private).to_json()) == [release]


def test_what_does_not_speak_of_this_engine_is_kept_once():
    foreign = SIGNER.release("sha256:" + "00" * 32, release=99)
    other_type = Envelope(note("x").payload, "text/plain").signed(SIGNER.private).to_json()
    release = SIGNER.release(ENGINE)
    deep = Envelope(b"[" * 40_000).to_json()
    assert kept([release], b"junk", foreign, other_type, deep, b"\xff") == [release, b"\xff"]
    assert kept([release], b"[" * 60_000, deep) == [release, deep]


def test_what_a_key_signed_about_another_engine_displaces_nothing_that_it_signed_about_this_one():
    elsewhere = note("2", digest="sha256:" + "00" * 32).signed(SIGNER.private).to_json()
    assert kept([signed("1")], elsewhere) == [signed("1"), elsewhere]


def test_a_key_that_is_not_trusted_or_no_longer_stands_for_nothing():
    several = [signed(str(number), by=REVOKED) for number in range(3)]
    assert kept([], *several) == several[-1:]
    release = REVOKED.release(ENGINE, release=9)
    assert kept([release], forged(release_envelope(ENGINE), REVOKED.public.key_id))[:1] != [release]


def test_where_there_is_too_much_what_stands_is_kept_first_then_what_is_signed_then_what_came_last():
    notes = [unsigned("x", f"urn:{number}") for number in range(MAX_ATTESTATIONS)]
    deeds = [signed("x", f"urn:{number}") for number in range(13)]
    stands = OTHER.release(ENGINE)
    assert kept(kept([stands], *deeds), *notes) == [stands, *deeds, *notes[-2:]]
    many = [signed("y", f"urn:more-{number}") for number in range(MAX_ATTESTATIONS)]
    assert kept([stands, *deeds], *many) == [stands, *many[-15:]]


def releases(signers):
    numbers, days = st.integers(1, 4), st.integers(1, 3)
    return st.builds(
        lambda signer, number, issued, expires, profiles: signer.release(
            ENGINE,
            release=number,
            issued=times.to_text(NOW_S - issued * DAY_S),
            expires=times.to_text(NOW_S + expires * DAY_S),
            profiles=profiles,
        ),
        st.sampled_from(signers),
        numbers,
        days,
        st.integers(0, 2),
        st.sampled_from([[], ["agx-thor"]]),
    )


ANYTHING = st.one_of(
    releases([SIGNER, OTHER, STRANGER, REVOKED]),
    st.builds(lambda n: forged(release_envelope(ENGINE, release=n)), st.integers(1, 99)),
    st.builds(lambda n: SIGNER.release("sha256:" + "00" * 32, release=n), st.integers(1, 99)),
    st.builds(lambda n: unsigned("x", f"urn:{n}"), st.integers(1, 99)),
    st.builds(signed, st.text(max_size=1), st.sampled_from(["urn:a", "urn:b"])),
    st.binary(max_size=3),
)


def verdict(attestations):
    """Who stands for the engine, and as what; None where nobody does."""
    try:
        found = endorsement(judge(attestations, KEYS, EXPECTED), KEYS, EXPECTED, 0)
    except UntrustedError:
        return None
    return set(found.signed_by), found.release, found.issued_s


@given(st.lists(st.lists(ANYTHING, max_size=MAX_ATTESTATIONS), max_size=5))
def test_what_is_kept_endorses_an_engine_as_all_that_ever_arrived_would(pushes):
    known: list[bytes] = []
    for push in pushes:
        known = kept(known, *push)
        assert len(known) <= MAX_ATTESTATIONS
    everything = [data for push in pushes for data in push]
    assert set(known) <= set(everything)
    assert verdict(known) == verdict(everything)
    assert kept(known) == known


@given(st.lists(ANYTHING, max_size=MAX_ATTESTATIONS))
def test_what_was_signed_by_a_trusted_key_makes_way_only_for_what_the_same_key_signed(push):
    deeds = [
        SIGNER.release(ENGINE),
        signed("mine"),
        OTHER.release(ENGINE, release=3),
        signed("its", by=OTHER),
    ]
    before = kept([], *deeds)
    after = kept(before, *push)
    signers = {key.key_id: key for key in KEYS.trusted}
    for lost in set(before) - set(after):
        was = Envelope.parse(lost)
        successors = [Envelope.parse(data) for data in set(after) - set(before) if _readable(data)]
        assert any(
            item.signers(signers) == was.signers(signers)
            and Statement.parse(item.payload).predicate_type == Statement.parse(was.payload).predicate_type
            for item in successors
        )


def _readable(data):
    return data.startswith(b"{") and b"payload" in data
