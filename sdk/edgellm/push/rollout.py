"""One bundle, many devices: each gets the variant that fits it, and one that fails stops no other."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from edgellm.bundle import Bundle, Variant
from edgellm.client import AsyncClient, DeviceInfo, PushProgress, PushResult, RateLimit
from edgellm.memory import MemoryPlan

Choose = Callable[[Bundle, DeviceInfo], Variant]


@dataclass(frozen=True)
class Options:
    """How engines are pushed: `jobs` devices at once, `streams` blobs of each, and so on.

    `rate` is shared by all of them; `retry_for_s` is how long a device may get no further.
    """

    jobs: int = 4
    streams: int = 4
    rate: RateLimit | None = None
    retry_for_s: float = 60.0
    activate: bool = True
    activation_timeout_s: float = 600.0


@dataclass(frozen=True)
class Outcome:
    """What became of one device; as far as it got, where `error` is set."""

    device: str
    variant: Variant | None = None
    pushed: PushResult | None = None
    plan: MemoryPlan | None = None
    """What it granted when the engine was activated."""
    activation_s: float | None = None
    error: Exception | None = None
    done: bool = False
    """It came to an end, good or bad."""

    @property
    def ok(self) -> bool:
        """All that was asked for was done."""
        return self.done and self.error is None


class Watcher(Protocol):
    """Looks on. Its methods are called in the event loop."""

    def phase(self, device: str, phase: str) -> None:
        """A device began something else: "pushing", a phase of its activation, "done" or "failed"."""

    def progress(self, device: str, at: PushProgress) -> None:
        """Bytes have gone out to a device."""


class Rollout:
    """Pushes to some devices, once.

    Args:
        bundle: Has a variant for each.
        devices: Their names, each once.
        choose: Finds the variant that fits; raises BundleError if none does.
        options: How.
        watcher: Is told how it goes.
    """

    def __init__(
        self, bundle: Bundle, devices: Sequence[str], choose: Choose, options: Options, watcher: Watcher
    ) -> None:
        self._bundle = bundle
        self._choose = choose
        self._options = options
        self._watcher = watcher
        self._slots = asyncio.Semaphore(options.jobs)
        self._outcomes = {device: Outcome(device) for device in devices}

    def outcomes(self) -> list[Outcome]:
        """In the order of the devices; also while it runs, and after it was cancelled."""
        return list(self._outcomes.values())

    async def run(self) -> None:
        """Comes to an end with every device; may be cancelled. What was sent stays on the devices."""
        tasks = [asyncio.create_task(self._serve(device)) for device in self._outcomes]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, device: str) -> None:
        async with self._slots:
            try:
                async with AsyncClient.for_device(device) as client:
                    await self._bring(device, client)
            except Exception as error:  # noqa: BLE001 - the others go on, and this one is told of
                self._note(device, error=error, done=True)
                self._watcher.phase(device, "failed")
            else:
                self._note(device, done=True)
                self._watcher.phase(device, "done")

    async def _bring(self, device: str, client: AsyncClient) -> None:
        options = self._options
        self._watcher.phase(device, "pushing")
        variant = self._choose(self._bundle, await client.info())
        self._note(device, variant=variant)
        pushed = await client.push(
            self._bundle,
            variant.digest,
            lambda at: self._watcher.progress(device, at),
            streams=options.streams,
            rate=options.rate,
            retry_for_s=options.retry_for_s,
        )
        self._note(device, pushed=pushed)
        if not options.activate:
            return
        began_s = time.monotonic()
        plan = await client.activate(
            variant.digest,
            lambda step: self._watcher.phase(device, step.phase),
            timeout_s=options.activation_timeout_s,
        )
        self._note(device, plan=plan, activation_s=time.monotonic() - began_s)

    def _note(self, device: str, **changes: object) -> None:
        self._outcomes[device] = replace(self._outcomes[device], **changes)  # type: ignore[arg-type]
