"""Installs the agent on a device over the system's ssh: `edgellm device setup`.

What a device is comes first (`facts`), then a plan of steps that each know whether they are done already
(`plan`), then the steps one by one (`run`): a setup that was cut goes on where it was cut.
"""

from edgellm.setup.facts import Facts, examine
from edgellm.setup.plan import Options, Step, plan
from edgellm.setup.run import Outcome, carry_out
from edgellm.setup.shell import RemoteShell, SetupError

__all__ = ["Facts", "Options", "Outcome", "RemoteShell", "SetupError", "Step", "carry_out", "examine", "plan"]
