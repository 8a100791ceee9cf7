"""Makes tiny Llama-family checkpoints, as a Hugging Face directory or a GGUF file, with a tokenizer that
really works.

The two writers share one set of weights for one `TinySpec`, so a test may compare what each reader makes of
them. Everything follows from the seed: equal arguments give equal bytes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
BOS_ID = 1
EOS_ID = 2
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_COMMON_MERGES = (
    "Ġ t,h e,i n,e r,a n,o n,r e,Ġ a,e s,o r,a t,e n,i t,Ġ s,Ġt he,o u,Ġ w,Ġ o,i s,in g,a l,Ġ c,e d,an d,"
    "Ġ in,Ġ b,Ġ p,Ġ f,Ġ of,Ġ m,o f,l e,a r,Ġ d,i c,Ġt o,r o,s t,v e,Ġ is"
)


@dataclass(frozen=True)
class TinySpec:
    """The shape of a tiny model; `head_dim * heads` need not equal `hidden`."""

    layers: int = 2
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    ffn: int = 128
    vocab: int = 300
    seed: int = 0
    tied: bool = True
    rope_theta: float = 10000.0
    rms_eps: float = 1e-5
    max_positions: int = 2048


def tiny_tensors(spec: TinySpec) -> dict[str, NDArray[np.float32]]:
    """All weights by their Hugging Face name, float32; linear weights are `[out, in]` with unit-gain
    spread.
    """
    rng = np.random.default_rng(spec.seed)
    query, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim

    def linear(rows: int, columns: int) -> NDArray[np.float32]:
        return (rng.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)

    def norm() -> NDArray[np.float32]:
        return (1.0 + 0.1 * rng.standard_normal(spec.hidden)).astype(np.float32)

    tensors = {"model.embed_tokens.weight": rng.standard_normal((spec.vocab, spec.hidden)).astype(np.float32)}
    for layer in range(spec.layers):
        prefix = f"model.layers.{layer}"
        tensors |= {
            f"{prefix}.input_layernorm.weight": norm(),
            f"{prefix}.self_attn.q_proj.weight": linear(query, spec.hidden),
            f"{prefix}.self_attn.k_proj.weight": linear(kv, spec.hidden),
            f"{prefix}.self_attn.v_proj.weight": linear(kv, spec.hidden),
            f"{prefix}.self_attn.o_proj.weight": linear(spec.hidden, query),
            f"{prefix}.post_attention_layernorm.weight": norm(),
            f"{prefix}.mlp.gate_proj.weight": linear(spec.ffn, spec.hidden),
            f"{prefix}.mlp.up_proj.weight": linear(spec.ffn, spec.hidden),
            f"{prefix}.mlp.down_proj.weight": linear(spec.hidden, spec.ffn),
        }
    tensors["model.norm.weight"] = norm()
    if not spec.tied:
        tensors["lm_head.weight"] = linear(spec.vocab, spec.hidden)
    return tensors


def tiny_vocabulary(size: int) -> tuple[list[str], list[str]]:
    """`size` token strings in id order (specials, bytes, merges, fillers) and the merges, in GPT-2
    notation.
    """
    alphabet = _byte_alphabet()
    if size < len(SPECIAL_TOKENS) + len(alphabet):
        raise ValueError(
            f"a byte-level vocabulary needs at least {len(SPECIAL_TOKENS) + len(alphabet)} tokens"
        )
    tokens = [*SPECIAL_TOKENS, *alphabet]
    known = set(tokens)
    merges: list[str] = []
    letters = "abcdefghijklmnopqrstuvwxyz"
    for merge in [*_COMMON_MERGES.split(","), *(f"{a} {b}" for a in letters for b in letters)]:
        left, right = merge.split(" ")
        if len(tokens) == size:
            break
        if left + right not in known and left in known and right in known:
            tokens.append(left + right)
            known.add(left + right)
            merges.append(merge)
    tokens += [f"<unused{index}>" for index in range(size - len(tokens))]
    return tokens, merges


def tiny_tokenizer_json(vocab: int) -> str:
    """A `tokenizer.json`: byte-level BPE in which every text survives encode and decode."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, merges = tiny_vocabulary(vocab)
    pairs = [(merge.split(" ")[0], merge.split(" ")[1]) for merge in merges]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    return str(tokenizer.to_str())


def make_tiny_hf(
    directory: Path,
    *,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    ffn: int = 128,
    vocab: int = 300,
    seed: int = 0,
    tied: bool = True,
    dtype: str = "float32",
    shards: int = 1,
) -> Path:
    """Write a Hugging Face directory (`dtype`: float32, float16 or bfloat16) and return it."""
    from safetensors.numpy import save_file

    spec = TinySpec(layers, hidden, heads, kv_heads, head_dim, ffn, vocab, seed, tied)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.astype(_numpy_dtype(dtype)) for name, tensor in tiny_tensors(spec).items()}
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    else:
        weight_map = {}
        for shard in range(shards):
            file_name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
            part = {name: tensors[name] for name in list(tensors)[shard::shards]}
            save_file(part, directory / file_name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file_name)
        index = {
            "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
            "weight_map": weight_map,
        }
        _write_json(directory / "model.safetensors.index.json", index)
    _write_json(directory / "config.json", _hf_config(spec, dtype))
    _write_json(directory / "generation_config.json", {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID})
    (directory / "tokenizer.json").write_text(tiny_tokenizer_json(vocab), encoding="utf-8")
    tokenizer_config = {
        "bos_token": SPECIAL_TOKENS[BOS_ID],
        "eos_token": SPECIAL_TOKENS[EOS_ID],
        "chat_template": CHAT_TEMPLATE,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    _write_json(directory / "tokenizer_config.json", tokenizer_config)
    return directory


def make_tiny_gguf(
    path: Path,
    *,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    ffn: int = 128,
    vocab: int = 300,
    seed: int = 0,
    tied: bool = True,
    quantization: str = "F32",
) -> Path:
    """Write a GGUF file (`quantization` of the linear weights: F32, F16, Q4_0, Q4_1 or Q8_0) and return it.

    The rows of q and k are interleaved as llama.cpp stores them for the Llama architecture.
    """
    import gguf

    spec = TinySpec(layers, hidden, heads, kv_heads, head_dim, ffn, vocab, seed, tied)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "llama")
    _add_gguf_metadata(writer, spec)
    kind = gguf.GGMLQuantizationType[quantization]
    for name, tensor in tiny_tensors(spec).items():
        stored = tensor
        if name.endswith("q_proj.weight"):
            stored = _interleave_rotary_rows(tensor, heads)
        elif name.endswith("k_proj.weight"):
            stored = _interleave_rotary_rows(tensor, kv_heads)
        if tensor.ndim == 1 or quantization == "F32":
            writer.add_tensor(_gguf_name(name), stored)
        else:
            writer.add_tensor(_gguf_name(name), gguf.quants.quantize(stored, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_gguf_metadata(writer: object, spec: TinySpec) -> None:
    import gguf

    assert isinstance(writer, gguf.GGUFWriter)
    tokens, merges = tiny_vocabulary(spec.vocab)
    control, normal = int(gguf.TokenType.CONTROL), int(gguf.TokenType.NORMAL)
    writer.add_name("tiny llama")
    writer.add_block_count(spec.layers)
    writer.add_context_length(spec.max_positions)
    writer.add_embedding_length(spec.hidden)
    writer.add_feed_forward_length(spec.ffn)
    writer.add_head_count(spec.heads)
    writer.add_head_count_kv(spec.kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_rope_dimension_count(spec.head_dim)
    writer.add_rope_freq_base(spec.rope_theta)
    writer.add_layer_norm_rms_eps(spec.rms_eps)
    writer.add_vocab_size(spec.vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([control if token in SPECIAL_TOKENS else normal for token in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(BOS_ID)
    writer.add_eos_token_id(EOS_ID)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _gguf_name(hf_name: str) -> str:
    stem = hf_name.removesuffix(".weight")
    if not stem.startswith("model.layers."):
        return f"{_GGUF_NAMES[stem]}.weight"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{_GGUF_NAMES[part]}.weight"


def _interleave_rotary_rows(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """From the half-split rotary layout of Hugging Face to llama.cpp's interleaved pairs, head by head."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))


def _hf_config(spec: TinySpec, dtype: str) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": spec.hidden,
        "intermediate_size": spec.ffn,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab,
        "max_position_embeddings": spec.max_positions,
        "rms_norm_eps": spec.rms_eps,
        "rope_theta": spec.rope_theta,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": spec.tied,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "torch_dtype": dtype,
    }


def _byte_alphabet() -> list[str]:
    """The 256 printable stand-ins for bytes, in the order of GPT-2's table."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]


def _numpy_dtype(name: str) -> np.dtype[np.generic]:
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
