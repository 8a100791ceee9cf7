"""Whose engines a device takes: each rule by its name."""

from __future__ import annotations

import asyncio
import sqlite3
import sys

import pytest

from edgellm.bundle import digest as digests
from edgellm.bundle.manifest import CONFIG_MEDIA_TYPE, Descriptor, EngineManifest, Layer
from edgellm.signing import PublicKey, SigningError, times
from edgellm_agent.errors import InvalidError, NotFoundError, PreconditionError, UntrustedError
from edgellm_agent.trust.base import Endorsement
from edgellm_agent.trust.keys import MAX_KEYS
from edgellm_agent.trust.policy import DeviceTrust, Held
from edgellm_agent.trust.settings import TrustSettings
from tests.support.signing import DAY_S, NOW_S, Signer
from tests.support.tiny_bundle import make_config

CONFIG = make_config()


def manifest_of(text: str) -> EngineManifest:
    raw = CONFIG.to_json()
    config = Descriptor(CONFIG_MEDIA_TYPE, digests.of_bytes(raw), len(raw))
    return EngineManifest.build(config, [Layer(text, "application/x", digests.of_bytes(text.encode()), 1)])


MANIFEST = manifest_of("one")
ENGINE = MANIFEST.digest
SIGNER = Signer.make()
OTHER = Signer.make("other")


class Device:
    """A device whose clocks the test holds; `restart` keeps what is on disk."""

    def __init__(self, state_dir, **settings):
        self.state_dir = state_dir
        self.settings = TrustSettings(**settings)
        self.wall_s, self.run_s = float(NOW_S), 0.0
        self.trust = self.open()

    def open(self):
        return DeviceTrust(
            self.settings,
            self.state_dir,
            "orin-nano-8gb",
            wall_s=lambda: self.wall_s,
            monotonic_s=lambda: self.run_s,
        )

    async def restart(self):
        await self.trust.close()
        self.trust = self.open()

    def admit(self, *attestations, proven=False, manifest=MANIFEST, config=CONFIG):
        return self.trust.admit(manifest, config, attestations, proven=proven)

    def refusal(self, *attestations, proven=False, manifest=MANIFEST):
        with pytest.raises(UntrustedError) as refused:
            self.admit(*attestations, proven=proven, manifest=manifest)
        return str(refused.value)


@pytest.fixture
async def device(tmp_path):
    made = Device(tmp_path)
    yield made
    await made.trust.close()


@pytest.fixture
async def guarded(device):
    """A device that trusts SIGNER."""
    device.trust.trust(SIGNER.public)
    return device


async def test_a_device_that_knows_no_key_takes_any_engine(device):
    assert device.admit() == Endorsement()
    assert device.admit(OTHER.release(ENGINE)) == Endorsement()


async def test_a_device_that_must_have_signatures_refuses_before_it_knows_a_key(tmp_path):
    device = Device(tmp_path, required=True)
    assert "trust one with `edgellm key trust`" in device.refusal(SIGNER.release(ENGINE))
    await device.trust.close()


async def test_an_engine_that_a_trusted_key_signed_is_endorsed(guarded):
    endorsed = guarded.admit(SIGNER.release(ENGINE))
    assert endorsed == Endorsement(("release",), 7, float(NOW_S - DAY_S))


async def test_an_unsigned_engine_is_refused_and_the_next_step_is_named(guarded):
    refusal = guarded.refusal()
    assert "tiny-int4 (" + ENGINE[7:19] + ") is not trusted: no release is signed" in refusal
    assert "Trusted here: release. Sign it with `edgellm sign`" in refusal


async def test_an_engine_signed_by_an_unknown_key_is_refused(guarded):
    assert f"not trusted here (key id '{OTHER.public.short_id}')" in guarded.refusal(OTHER.release(ENGINE))


async def test_an_engine_signed_by_a_revoked_key_is_refused(guarded):
    guarded.trust.trust(OTHER.public)
    guarded.trust.revoke("release", list)
    assert "signed by release, which was revoked here" in guarded.refusal(SIGNER.release(ENGINE))
    assert guarded.admit(OTHER.release(ENGINE)).signed_by == ("other",)


async def test_a_revoked_key_is_never_trusted_again(guarded):
    guarded.trust.revoke("release", list)
    with pytest.raises(PreconditionError, match="revoked here and is never trusted again"):
        guarded.trust.trust(SIGNER.public)
    await guarded.restart()
    with pytest.raises(PreconditionError, match="never trusted again"):
        guarded.trust.trust(SIGNER.public)
    assert guarded.refusal(SIGNER.release(ENGINE))


async def test_a_device_whose_last_key_was_revoked_does_not_take_unsigned_engines(guarded):
    guarded.trust.revoke("release", list)
    await guarded.restart()
    assert "No key is trusted here" in guarded.refusal()


async def test_a_release_of_another_engine_is_refused(guarded):
    assert "of another engine" in guarded.refusal(SIGNER.release(manifest_of("two").digest))


async def test_an_expired_release_is_refused_also_where_the_engine_was_proven(guarded):
    expired = SIGNER.release(ENGINE, expires=times.to_text(NOW_S))
    assert "expired on" in guarded.refusal(expired)
    assert "expired on" in guarded.refusal(expired, proven=True)


async def test_a_release_for_another_board_is_refused(guarded):
    assert "is for agx-thor" in guarded.refusal(SIGNER.release(ENGINE, profiles=["agx-thor"]))
    assert guarded.admit(SIGNER.release(ENGINE, profiles=["orin-nano-8gb"])).release == 7


async def test_a_release_under_another_name_is_refused(guarded):
    assert "is of 'other'" in guarded.refusal(SIGNER.release(ENGINE, name="other"))


async def test_the_key_s_time_bounds_what_it_signs(device):
    ended = Signer.make("ended", None, NOW_S - 1)
    device.trust.trust(ended.public)
    assert "ended was valid until" in device.refusal(ended.release(ENGINE))


async def test_an_older_release_than_the_highest_committed_one_is_refused_unless_it_was_proven(guarded):
    """The replay of an old bundle, with the fault that the new one mended."""
    old, new = SIGNER.release(ENGINE, release=7), SIGNER.release(manifest_of("two").digest, release=8)
    guarded.trust.committed(CONFIG, guarded.admit(new, manifest=manifest_of("two")))
    await guarded.restart()
    assert "it is release 7 of tiny-int4, and release 8 was committed" in guarded.refusal(old)
    assert guarded.admit(old, proven=True).release == 7
    assert guarded.admit(new, manifest=manifest_of("two")).release == 8


async def test_a_release_that_was_only_admitted_does_not_push_older_ones_out(guarded):
    guarded.admit(SIGNER.release(ENGINE, release=9))
    assert guarded.admit(SIGNER.release(ENGINE, release=7)).release == 7


async def test_going_back_does_not_lower_the_highest_release(guarded):
    for number in (8, 7):
        guarded.trust.committed(CONFIG, Endorsement(("release",), number, NOW_S - DAY_S))
    assert "release 8 was committed" in guarded.refusal(SIGNER.release(ENGINE, release=7))


async def test_releases_of_another_name_are_counted_apart(guarded):
    guarded.trust.committed(make_config(name="big"), Endorsement(("release",), 40, NOW_S - DAY_S))
    assert guarded.admit(SIGNER.release(ENGINE, release=1)).release == 1


async def test_of_several_signed_releases_the_highest_counts(guarded):
    both = [SIGNER.release(ENGINE, release=number) for number in (3, 12, 5)]
    assert guarded.admit(*both).release == 12


async def test_one_key_suffices_and_all_that_stand_for_it_are_named(guarded):
    guarded.trust.trust(OTHER.public)
    assert guarded.admit(OTHER.release(ENGINE)).signed_by == ("other",)
    assert guarded.admit(OTHER.release(ENGINE), SIGNER.release(ENGINE)).signed_by == ("other", "release")


async def test_too_many_or_too_large_attestations_are_refused_on_any_device(device):
    with pytest.raises(InvalidError, match="17 attestations"):
        device.trust.retained(MANIFEST, CONFIG, [], [b"{}"] * 17)
    with pytest.raises(InvalidError, match="65,537 bytes"):
        device.trust.retained(MANIFEST, CONFIG, [], [b" " * 65_537])


async def test_a_device_without_keys_does_not_pay_for_cryptography(tmp_path):
    program = (
        "import sys; from pathlib import Path; from edgellm_agent.services import trust\n"
        "from edgellm_agent.trust.policy import DeviceTrust\n"
        "from edgellm_agent.trust.settings import TrustSettings\n"
        "DeviceTrust(TrustSettings(), Path(sys.argv[1]), 'host').known_keys()\n"
        "sys.exit('cryptography' in sys.modules)"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, str(tmp_path))
    assert await asyncio.wait_for(process.wait(), 60) == 0


async def test_keys_are_listed_and_renamed_and_survive_a_restart(device):
    device.trust.trust(SIGNER.public)
    device.trust.trust(PublicKey.from_pem("new", SIGNER.public.pem.encode(), 5))
    await device.restart()
    (known,) = device.trust.known_keys()
    assert (known.key.name, known.key.not_before_s, known.provisioned) == ("new", 5, False)


async def test_a_key_is_revoked_by_its_id_where_two_have_its_name(guarded):
    twin = Signer.make("release")
    guarded.trust.trust(twin.public)
    with pytest.raises(PreconditionError, match="2 keys are named 'release'; use the key id"):
        guarded.trust.revoke("release", list)
    known, _ = guarded.trust.revoke(twin.public.key_id, list)
    assert known.key == twin.public
    assert guarded.admit(SIGNER.release(ENGINE)).signed_by == ("release",)


async def test_an_unknown_key_cannot_be_revoked_and_the_known_ones_are_named(guarded):
    with pytest.raises(NotFoundError, match="known: release"):
        guarded.trust.revoke("nobody", list)
    with pytest.raises(InvalidError, match="give a key id or a name"):
        guarded.trust.revoke("", list)


async def test_revoking_names_the_engines_for_which_nobody_else_stands(guarded):
    guarded.trust.trust(OTHER.public)
    two, three, four = (manifest_of(text).digest for text in ("two", "three", "four"))
    expired = {"issued": times.to_text(NOW_S - 9), "expires": times.to_text(NOW_S - 1)}
    held = [
        Held(ENGINE, [SIGNER.release(ENGINE)]),
        Held(two, [SIGNER.release(two), OTHER.release(two)]),
        Held(three, [OTHER.release(three)]),
        Held(four, [SIGNER.release(four, **expired)]),
        Held(manifest_of("five").digest, []),
    ]
    _, alone = guarded.trust.revoke("release", lambda: held)
    assert alone == [ENGINE, four]


async def test_there_is_a_bound_on_trusted_keys(device):
    for number in range(MAX_KEYS):
        device.trust.trust(Signer.make(f"k{number}").public)
    with pytest.raises(PreconditionError, match="64 keys are trusted already"):
        device.trust.trust(SIGNER.public)
    device.trust.revoke("k0", list)
    device.trust.trust(SIGNER.public)


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "keys"
    made.mkdir()
    (made / "release.pub.json").write_bytes(SIGNER.public.to_json())
    return made


async def test_provisioned_keys_are_trusted_from_the_first_start_on(tmp_path, folder):
    device = Device(tmp_path, keys_dir=folder)
    assert [item.provisioned for item in device.trust.known_keys()] == [True]
    assert device.admit(SIGNER.release(ENGINE)).signed_by == ("release",)
    assert device.refusal()
    await device.trust.close()


async def test_a_provisioned_key_can_be_revoked_though_its_file_stays(tmp_path, folder):
    device = Device(tmp_path, keys_dir=folder)
    device.trust.revoke("release", list)
    await device.restart()
    (known,) = device.trust.known_keys()
    assert (known.provisioned, known.revoked_at_s) == (True, NOW_S)
    assert "revoked here" in device.refusal(SIGNER.release(ENGINE))
    await device.trust.close()


async def test_what_a_provisioned_key_is_its_file_says(tmp_path, folder):
    device = Device(tmp_path, keys_dir=folder)
    assert device.trust.trust(SIGNER.public).provisioned
    longer = PublicKey.from_pem("release", SIGNER.public.pem.encode(), None, NOW_S + 900 * DAY_S)
    with pytest.raises(PreconditionError, match=r"change its file in trust\.keys_dir"):
        device.trust.trust(longer)
    await device.trust.close()


@pytest.mark.parametrize("what", ["no folder", "empty", "broken", "writable by others", "private"])
async def test_a_folder_of_keys_that_gives_none_opens_nothing(tmp_path, folder, what, caplog):
    path = folder / "release.pub.json"
    match what:
        case "no folder":
            path.unlink()
            folder.rmdir()
        case "empty":
            path.unlink()
        case "broken":
            path.write_text("{")
        case "writable by others":
            path.chmod(0o666)
        case "private":
            path.write_bytes(SIGNER.private.to_pem(None))
    device = Device(tmp_path, keys_dir=folder)
    assert "No key is trusted here" in device.refusal()
    assert "No key is trusted here" in device.refusal(SIGNER.release(ENGINE))
    assert what == "empty" or "keys" in caplog.text
    assert "PRIVATE" not in caplog.text
    await device.trust.close()


async def test_a_clock_that_fell_back_does_not_make_an_expired_release_count_again(guarded):
    short = SIGNER.release(ENGINE, expires=times.to_text(NOW_S + 3600))
    guarded.trust.committed(CONFIG, guarded.admit(SIGNER.release(ENGINE, issued=times.to_text(NOW_S + 7200))))
    await guarded.restart()
    guarded.wall_s = 0.0
    assert "expired on" in guarded.refusal(short)
    assert guarded.admit(SIGNER.release(ENGINE, issued=times.to_text(NOW_S))).release == 7


async def test_an_endorsement_that_nobody_signed_says_nothing_about_the_time_or_the_release(device):
    device.trust.committed(CONFIG, Endorsement((), 0, NOW_S + 900 * DAY_S))
    device.trust.trust(SIGNER.public)
    assert device.admit(SIGNER.release(ENGINE, release=1)).release == 1


async def test_what_cannot_be_written_at_the_end_does_not_keep_the_agent_from_ending(guarded, monkeypatch):
    def broken(_self, _floor_s):
        raise sqlite3.OperationalError("attempt to write a readonly database")

    monkeypatch.setattr("edgellm_agent.trust.store.TrustStore.keep_floor", broken)
    trust = guarded.open()
    trust.start()
    await trust.close()


def test_a_release_must_make_sense_before_it_is_signed():
    with pytest.raises(SigningError, match="release: release"):
        SIGNER.release(ENGINE, release=0)
