"""What a fleet may desire is bounded by its role, and written down."""

import asyncio

import pytest

from edgellm_agent.access.audit import AuditLog
from edgellm_agent.access.fleet import Fleet
from edgellm_agent.desired.controller import DesiredController
from edgellm_agent.desired.settings import DesiredSettings
from tests.support.desired_device import FakeUplink, make_layout, make_manager
from tests.support.range_server import range_server


@pytest.fixture
def layout(tmp_path):
    (tmp_path / "served").mkdir()
    _, digest = make_layout(tmp_path / "served" / "first")
    return tmp_path / "served", digest


async def outcome(tmp_path, layout, role, phase):
    """What a fleet of that role is told in the end, what was asked of the source, and what the log has."""
    root, digest = layout
    audit = AuditLog(tmp_path / "audit")
    await audit.start()
    uplink, manager = FakeUplink(), make_manager(tmp_path / "state")
    with range_server(root) as server:
        settings = DesiredSettings(sources=[server.url])
        controller = DesiredController(settings, manager, uplink, Fleet(role, audit))
        manager.settle()
        await manager.start()
        controller.start()
        uplink.desire(1, digest, f"{server.url}/first")
        reported = await uplink.until_phase(phase)
        # The engine answers before that is written down.
        for _ in range(1000):
            if await audit.last(1):
                break
            await asyncio.sleep(0.01)
        await controller.close()
        await manager.close()
        await audit.close()
        found = [(r.caller, r.role, r.method, r.subject, r.outcome) for r in await audit.last(9)]
        return reported, server.asked, found


@pytest.mark.parametrize("role", ["viewer", "app"])
async def test_a_fleet_that_may_not_bring_engines_is_refused_before_a_byte_is_fetched(tmp_path, layout, role):
    reported, asked, found = await outcome(tmp_path, layout, role, "REFUSED")
    assert reported.error == f"fleet has the role {role}; EngineService/Prepare needs operator"
    assert asked == []
    assert found == [("fleet", role, "EngineService/Prepare", "", "PERMISSION_DENIED")]


async def test_what_the_fleet_activates_is_written_down(tmp_path, layout):
    _, _, found = await outcome(tmp_path, layout, "operator", "CONVERGED")
    assert found == [("fleet", "operator", "EngineService/Activate", layout[1], "OK")]
