"""The audit log: a chain of lines that survives power cuts and shows what was changed."""

import asyncio
import errno
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm.v1 import device_pb2
from edgellm_agent.access import chain as chain_module
from edgellm_agent.access.audit import METHOD, AuditLog
from edgellm_agent.access.caller import Caller, Role
from edgellm_agent.access.chain import Chain
from edgellm_agent.errors import DataLossError

ALICE = Caller("certificate alice", Role.OPERATOR)
NOW_NS = 1_800_000_000 * 10**9


def record(subject="x"):
    return device_pb2.AuditRecord(caller="uid 1", role="app", method="S/M", subject=subject, outcome="OK")


def filled(folder, count=5, **options):
    chain = Chain(folder, **options)
    for number in range(count):
        chain.append([record(f"n{number}")])
    return chain


def only_file(folder):
    (file,) = folder.glob("*.jsonl")
    return file


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "audit"


class TestChain:
    def test_records_come_back_in_order_with_their_numbers(self, folder):
        chain = filled(folder, 3)
        assert [(r.sequence, r.subject) for r in chain.last(10)] == [(1, "n0"), (2, "n1"), (3, "n2")]
        assert [r.subject for r in chain.last(2)] == ["n1", "n2"]
        assert chain.verify() == 3

    def test_a_line_is_json_and_whatever_a_caller_sends_stays_in_it(self, folder):
        Chain(folder).append([record('a"\n{"sequence": "7"}\u2028\x00')])
        (line,) = only_file(folder).read_text().splitlines()
        assert json.loads(line)["subject"] == 'a"\n{"sequence": "7"}\u2028\x00'

    def test_the_chain_goes_on_after_a_restart(self, folder):
        filled(folder, 2)
        filled(folder, 2)
        assert Chain(folder).verify() == 4
        assert [r.sequence for r in Chain(folder).last(9)] == [1, 2, 3, 4]

    def test_only_the_agent_may_read_it(self, folder):
        filled(folder)
        assert folder.stat().st_mode & 0o777 == 0o700
        assert only_file(folder).stat().st_mode & 0o777 == 0o600

    def test_old_files_make_way_and_the_chain_goes_on_from_file_to_file(self, folder):
        chain = filled(folder, 40, max_file_bytes=500, max_files=3)
        files = sorted(folder.glob("*.jsonl"))
        assert len(files) == 3
        assert all(file.stat().st_size <= 500 for file in files)
        kept = chain.last(100)
        assert [r.sequence for r in kept] == list(range(kept[0].sequence, 41))
        assert 1 < kept[0].sequence < 40
        assert chain.verify() == len(kept)
        assert filled(folder, 1, max_file_bytes=500, max_files=3).verify() >= len(kept) - 4

    @given(st.data())
    @settings(max_examples=60, deadline=None)
    def test_a_change_of_any_byte_shows(self, tmp_path_factory, data):
        folder = tmp_path_factory.mktemp("audit")
        filled(folder, 4)
        file = only_file(folder)
        lines = bytearray(file.read_bytes())
        # The last line has none after it that would tell.
        end = lines.rfind(b"\n", 0, len(lines) - 1)
        at = data.draw(st.integers(0, end - 1))
        lines[at] ^= data.draw(st.integers(1, 255))
        file.write_bytes(bytes(lines))
        with pytest.raises(DataLossError):
            Chain(folder).verify()

    @pytest.mark.parametrize("gone", [0, 1, 3])
    def test_a_removed_line_shows(self, folder, gone):
        filled(folder)
        lines = only_file(folder).read_bytes().splitlines(keepends=True)
        only_file(folder).write_bytes(b"".join(lines[:gone] + lines[gone + 1 :]))
        with pytest.raises(DataLossError, match=f"line {gone + 1} of"):
            Chain(folder).verify()

    def test_reordered_lines_show(self, folder):
        filled(folder)
        lines = only_file(folder).read_bytes().splitlines(keepends=True)
        lines[2], lines[3] = lines[3], lines[2]
        only_file(folder).write_bytes(b"".join(lines))
        with pytest.raises(DataLossError, match="line 3 of"):
            Chain(folder).verify()

    @pytest.mark.parametrize("which", [0, 1])
    def test_a_removed_file_shows(self, folder, which):
        filled(folder, 20, max_file_bytes=500, max_files=100)
        sorted(folder.glob("*.jsonl"))[which].unlink()
        with pytest.raises(DataLossError):
            Chain(folder, max_files=100).verify()

    @given(st.integers(1, 10_000))
    @settings(max_examples=40, deadline=None)
    def test_a_last_line_torn_anywhere_is_dropped_and_counted(self, tmp_path_factory, cut):
        folder = tmp_path_factory.mktemp("audit")
        filled(folder, 3)
        file = only_file(folder)
        whole = file.read_bytes()
        last = len(whole) - (whole.rfind(b"\n", 0, len(whole) - 1) + 1)
        cut = 1 + cut % (last - 1)
        file.write_bytes(whole[:-cut])
        again = Chain(folder)
        assert again.open() == last - cut
        again.append([record("after")])
        assert [r.subject for r in again.last(9)] == ["n0", "n1", "after"]
        assert again.verify() == 3

    def test_zeros_that_a_power_cut_left_are_dropped(self, folder):
        filled(folder, 2)
        with only_file(folder).open("ab") as file:
            file.write(bytes(100) + b"\n")
        again = Chain(folder)
        assert again.open() == 101
        again.append([record()])
        assert again.verify() == 3

    def test_a_file_that_was_begun_and_not_written_is_no_break(self, folder):
        filled(folder, 3)
        (folder / "0000000000000004.jsonl").write_bytes(b'{"seq')
        again = Chain(folder)
        assert again.open() == 5
        again.append([record()])
        assert again.verify() == 4

    def test_a_disk_that_fills_up_leaves_no_half_record(self, folder, monkeypatch):
        chain = filled(folder, 2)
        before = only_file(folder).read_bytes()
        write = os.write
        monkeypatch.setattr(chain_module.os, "write", lambda fd, data: write(fd, data[:20]))
        with pytest.raises(OSError, match="No space left"):
            chain.append([record("lost")])
        assert only_file(folder).read_bytes() == before
        monkeypatch.undo()
        chain.append([record("after")])
        assert [r.subject for r in chain.last(9)] == ["n0", "n1", "after"]
        assert chain.verify() == 3

    def test_it_is_synced_before_it_counts(self, folder, monkeypatch):
        chain, synced = filled(folder, 1), []
        fsync = os.fsync
        monkeypatch.setattr(
            chain_module.os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_size), fsync(fd))
        )
        chain.append([record()])
        assert synced == [only_file(folder).stat().st_size]


class Disk:
    """Fails while it is told to."""

    def __init__(self, monkeypatch):
        self.full = False
        append = chain_module._append

        def maybe(file: Path, lines: bytes) -> None:
            if self.full:
                raise OSError(errno.EROFS, "Read-only file system")
            append(file, lines)

        monkeypatch.setattr(chain_module, "_append", maybe)


@pytest.fixture
async def audit(folder):
    log = AuditLog(folder, wall_ns=lambda: NOW_NS, clock=lambda: 0.0)
    await log.start()
    yield log
    await log.close()


async def told(audit):
    return [(r.caller, r.role, r.method, r.subject, r.outcome) for r in await audit.last(1000)]


class TestLog:
    async def test_a_record_is_on_disk_when_it_has_been_noted(self, audit, folder):
        await audit.note(ALICE, "EngineService/Activate", "tiny", "OK")
        (found,) = Chain(folder).last(9)
        assert (found.caller, found.role, found.subject) == ("certificate alice", "operator", "tiny")
        assert found.time.ToNanoseconds() == NOW_NS

    async def test_many_at_once_are_all_there(self, audit):
        await asyncio.gather(*(audit.note(ALICE, "S/M", str(n), "OK") for n in range(200)))
        assert {subject for *_, subject, _ in await told(audit)} == {str(n) for n in range(200)}
        assert await audit.verify() == 200

    async def test_a_disk_that_takes_nothing_stops_nobody_and_the_agents_log_has_the_record(
        self, audit, monkeypatch, caplog
    ):
        disk = Disk(monkeypatch)
        disk.full = True
        await audit.note(ALICE, "EngineService/RemoveEngine", "tiny", "OK")
        assert "Read-only file system" in caplog.text
        assert "caller='certificate alice'" in caplog.text
        assert "subject='tiny'" in caplog.text
        disk.full = False
        await audit.note(ALICE, "EngineService/Activate", "other", "OK")
        gap, after = await told(audit)
        assert gap == (
            "",
            "admin",
            METHOD,
            "1 records could not be written; the agent's log has them",
            "DATA_LOSS",
        )
        assert after[3] == "other"

    async def test_a_folder_that_cannot_be_made_stops_nobody(self, tmp_path, caplog):
        (tmp_path / "audit").write_text("a file is in the way")
        log = AuditLog(tmp_path / "audit")
        await log.start()
        await log.note(ALICE, "S/M", "x", "OK")
        await log.close()
        assert "audit.not_written" in caplog.text

    async def test_a_torn_line_is_told_in_the_log_itself(self, folder):
        filled(folder, 1)
        with only_file(folder).open("ab") as file:
            file.write(b'{"half')
        log = AuditLog(folder)
        await log.start()
        await log.close()
        assert (await told(log))[-1][3:] == ("6 bytes of a torn last line are gone", "DATA_LOSS")

    async def test_of_endless_refusals_only_some_are_written_and_the_rest_counted(self, folder):
        now = [0.0]
        log = AuditLog(folder, clock=lambda: now[0])
        await log.start()
        for _ in range(100):
            log.note_refusal("uid 7", "viewer", "S/M", "PERMISSION_DENIED")
        now[0] = 5.0
        log.note_refusal("uid 7", "viewer", "S/M", "PERMISSION_DENIED")
        await log.close()
        subjects = [subject for *_, subject, _ in await told(log)]
        assert subjects == [""] * 30 + ["70 refusals before it were not written"]

    async def test_what_waits_is_written_before_the_end(self, folder):
        log = AuditLog(folder)
        await log.start()
        for _ in range(20):
            log.note_refusal("uid 7", "viewer", "S/M", "PERMISSION_DENIED")
        await log.close()
        assert len(await told(log)) == 20

    async def test_long_texts_are_cut(self, audit):
        await audit.note(ALICE, "m" * 5000, "s" * 5000, "OK")
        ((_, _, method, subject, _),) = await told(audit)
        assert (len(method), len(subject)) == (200, 200)
