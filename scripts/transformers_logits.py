"""Records what transformers computes for tiny checkpoints of every family: tests/data/transformers/NAME.npz.

    python scripts/transformers_logits.py            # all of them
    python scripts/transformers_logits.py gemma3     # one

Needs torch and transformers, which nothing else here does; run it from the root of the repository with an
environment that has them beside numpy, safetensors and tokenizers. The tests compare our graphs with these.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.support.tiny_families import CONFIGS, POSITIONS, TOKENS, write_family  # noqa: E402

RECORDS = ROOT / "tests" / "data" / "transformers"


def transformers_logits(directory: Path) -> NDArray[np.float32]:
    """Logits `[len(POSITIONS), vocab]` of the checkpoint for `TOKENS`: float32, plain attention, no cache."""
    import torch  # noqa: PLC0415
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        output = model.eval()(torch.from_numpy(TOKENS)[None], use_cache=False)
    return np.asarray(output.logits[0, list(POSITIONS)].numpy(), np.float32)


def record(name: str) -> None:
    """Write the record of one checkpoint."""
    import torch  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as folder:
        logits = transformers_logits(write_family(Path(folder) / name, name))
    RECORDS.mkdir(parents=True, exist_ok=True)
    made_by = f"transformers {transformers.__version__}, torch {torch.__version__}"
    np.savez_compressed(RECORDS / f"{name}.npz", logits=logits, made_by=np.array(made_by))
    print(f"{name}: {made_by}, logits of spread {logits.std():.2f}")


if __name__ == "__main__":
    for chosen in sys.argv[1:] or CONFIGS:
        record(chosen)
