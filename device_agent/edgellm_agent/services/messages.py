"""What the services say of engines."""

from __future__ import annotations

from google.protobuf.timestamp_pb2 import Timestamp

from edgellm.v1 import engines_pb2
from edgellm_agent.lifecycle.activation import Phase
from edgellm_agent.lifecycle.library import StoredEngine
from edgellm_agent.lifecycle.manager import EngineManager
from edgellm_agent.registry import HistoryRow


def engine_message(manager: EngineManager, stored: StoredEngine) -> engines_pb2.Engine:
    """An engine in the store, as clients see it."""
    standing = manager.standing(stored)
    return engines_pb2.Engine(
        digest=stored.digest,
        name=stored.config.name,
        runtime=stored.config.runtime,
        precision=stored.config.precision.weights,
        size_bytes=stored.manifest.size_bytes,
        added_at=_timestamp(stored.added_at),
        active=standing.active,
        state=standing.state,
        proven=standing.proven,
        signed_by=standing.endorsement.signed_by,
        release=standing.endorsement.release,
    )


def phase_message(phase: Phase) -> engines_pb2.ActivateResponse:
    """A step of an activation."""
    return engines_pb2.ActivateResponse(
        phase=phase.phase,
        elapsed_s=phase.elapsed_s,
        plan=None if phase.plan is None else phase.plan.to_proto(),
        probation_s=phase.probation_s,
    )


def history_message(row: HistoryRow) -> engines_pb2.HistoryEntry:
    """Something that happened."""
    return engines_pb2.HistoryEntry(id=row.id, time=_timestamp(row.time), change=row.change)


def _timestamp(seconds: float) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromNanoseconds(int(seconds * 1e9))
    return timestamp
