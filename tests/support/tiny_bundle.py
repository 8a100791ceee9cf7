"""An engine of a few bytes: its config, and a directory of files that nobody can run."""

from __future__ import annotations

import random
from pathlib import Path

from edgellm.bundle import EngineConfig
from edgellm.bundle.config import EngineFiles, Footprint, ModelShape, Precision, SpecialTokens, Target

# Several chunks, of which none is like another.
WEIGHTS = random.Random(0).randbytes(3 << 20)


def make_config(profile: str = "orin-nano-8gb", **changes: object) -> EngineConfig:
    config = EngineConfig(
        name="tiny-int4",
        runtime="onnxruntime",
        runtime_requires=">=1.23",
        target=Target(profile=profile),
        model=ModelShape(
            architecture="llama",
            layers=2,
            hidden_size=64,
            heads=4,
            kv_heads=2,
            head_dim=16,
            ffn_size=128,
            vocab_size=300,
            context_length=2048,
        ),
        precision=Precision(
            weights="int4",
            group_size=32,
            scheme="asymmetric",
            embedding="int8",
            head="int8",
            activations="float32",
        ),
        tokens=SpecialTokens(eos_ids=(2,)),
        footprint=Footprint(
            weights_bytes=3 << 20, workspace_base_bytes=1 << 20, workspace_bytes_per_token=1024
        ),
        files=EngineFiles(graph="model.onnx", tokenizer="tokenizer.json", chat_template="chat.jinja"),
    )
    return config.model_copy(update=changes)


def make_files(directory: Path, weights: bytes = WEIGHTS) -> Path:
    directory.mkdir()
    (directory / "model.onnx").write_bytes(b"graph")
    (directory / "tokenizer.json").write_bytes(b"{}")
    (directory / "chat.jinja").write_bytes(b"{{ messages }}")
    (directory / "weights-00000.bin").write_bytes(weights)
    return directory
