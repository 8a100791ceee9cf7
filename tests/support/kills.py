"""Pushing and activating an engine on an agent that is killed on the way, and what must hold afterwards."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from edgellm.bundle import Bundle
from edgellm.bundle.manifest import EngineManifest
from edgellm.errors import EdgellmError
from tests.support.agents import Agent, wait_for

# From a broken connection until its process can be waited for.
_DYING_S = 10.0


@dataclass
class Street:
    """One agent's way from an old engine to a new one, with a power cut somewhere."""

    agent: Agent
    old: Bundle
    new: Bundle
    promised: list[str] = field(default_factory=list)
    """What the device had said it had done, when it was cut."""

    def begin(self) -> None:
        """The old engine is active, and the agent stopped."""
        self.agent.start()
        (variant,) = self.old.variants
        with self.agent.client() as client:
            client.push(self.old, variant.digest)
            client.activate(variant.digest, until_committed=True)
        self.agent.stop()

    def walk(self, **environment: str) -> bool:
        """Pushes and activates the new engine, as far as the agent lives; then it is dead.

        Returns whether it was killed on the way; raises AssertionError if it ended or failed in another way.
        """
        self.agent.module, self.agent.environment = "tests.support.killed_agent", environment
        failure: Exception | None = None
        try:
            try:
                self._go()
            except (EdgellmError, AssertionError) as error:
                failure = error
            return self._was_killed(failure)
        finally:
            self.agent.module, self.agent.environment = "edgellm_agent", {}
            self.agent.stop(signal.SIGKILL)

    def _go(self) -> None:
        (variant,) = self.new.variants
        self.agent.start()
        process = self.agent.process
        assert process is not None
        # While the old engine is loaded, the device activates no other.
        wait_for(lambda: process.poll() is not None or _answers(self.agent), "the old engine")
        with self.agent.client() as client:
            # Nobody starts the agent again meanwhile.
            client.push(self.new, variant.digest, retry_for_s=0)
            self.promised.append("PUSHED")
            client.activate(variant.digest, self._promise, until_committed=True)

    def _was_killed(self, failure: Exception | None) -> bool:
        """An agent that lives, or ends by itself, has no excuse for a failure."""
        assert self.agent.process is not None
        ended = self.agent.process.poll()
        if failure is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                ended = self.agent.process.wait(_DYING_S)
        if ended != -signal.SIGKILL and (failure is not None or ended is not None):
            told = "lives" if ended is None else f"ended with {ended}"
            raise AssertionError(f"the agent {told}, not killed: {failure}\n{self.agent.log}") from failure
        return ended is not None

    def _promise(self, step: object) -> None:
        words = {"probation": "ACTIVATED", "committed": "COMMITTED"}
        if (word := words.get(step.phase)) is not None:  # type: ignore[attr-defined]
            self.promised.append(word)

    def check(self) -> None:
        """After a start, what was promised holds, whatever runs is whole, and nothing is left behind."""
        self.agent.start()
        old, new = self.old.variants[0].digest, self.new.variants[0].digest
        with self.agent.client() as client:
            wait_for(lambda: _answers(self.agent), f"an engine after {self.promised}")
            active = client.info().active_engine
            assert active in {old, new}
            told = [entry.what for entry in client.history() if entry.engine == new]
            assert set(self.promised) <= set(told), (self.promised, told)
            if "ACTIVATED" in self.promised:
                assert active == new
            self._check_files()
            # And it goes on where it was.
            client.push(self.new, new)
            client.activate(new, until_committed=True)
            assert client.info().active_engine == new
            assert _answers(self.agent)
            client.remove(old)
            self._check_files()
        self.agent.stop()

    def end(self) -> None:
        """Whatever has become of it, the agent does not outlive its test."""
        if self.agent.process is not None and self.agent.process.poll() is None:
            self.agent.stop(signal.SIGKILL)

    def _check_files(self) -> None:
        """Each file belongs to an engine that the registry knows."""
        state = self.agent.state
        database = sqlite3.connect(f"file:{state}/registry.db?mode=ro", uri=True)
        digests = [digest for (digest,) in database.execute("SELECT digest FROM engines")]
        pushing = [d for (d,) in database.execute("SELECT digest FROM engines WHERE state = 'pushing'")]
        database.close()
        allowed: set[str] = set()
        for digest in digests:
            path = state / "blobs" / "sha256" / digest.removeprefix("sha256:")
            assert path.exists() or digest in pushing, f"the manifest of {digest} is gone"
            if path.exists():
                manifest = EngineManifest.parse(path.read_bytes())
                allowed |= {_hex(blob.digest) for blob in manifest.blobs()} | {_hex(digest)}
        assert {path.name for path in (state / "blobs" / "sha256").iterdir()} <= allowed
        assert {path.name for path in (state / "ingest").iterdir()} <= allowed
        folders = {path.name for path in (state / "engines").iterdir()}
        assert folders <= {_hex(digest) for digest in digests}, folders


def _hex(digest: str) -> str:
    return digest.removeprefix("sha256:")


def _answers(agent: Agent) -> bool:
    try:
        with agent.client(timeout_s=10) as client:
            return client.generate("Hello", max_tokens=2, ignore_eos=True).read().completion_tokens == 2
    except EdgellmError:
        return False


def count_changes(street: Street, file: Path) -> int:
    """How many changes an undisturbed walk makes."""
    assert not street.walk(POWER_CUT_COUNT=os.fspath(file))
    return int(file.read_text())
