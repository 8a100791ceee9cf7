"""`python -m edgellm_agent.worker.sandbox`: enters a sandbox and prints, as JSON, what holds in it."""

import dataclasses
import json
import sys
from pathlib import Path

from edgellm_agent.worker.sandbox.confinement import enter

if __name__ == "__main__":
    json.dump(dataclasses.asdict(enter(Path(sys.prefix))), sys.stdout)
