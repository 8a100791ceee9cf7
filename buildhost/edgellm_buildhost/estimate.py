"""What a model would become, from its config.json alone; a build that cannot fit is refused before it begins.

Nothing of the weights is read. The estimates are what the builds would write, so a plan made of them is the
plan that a device makes of the engine.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path

from edgellm.bundle.config import EngineConfig, SpecialTokens
from edgellm.errors import DoesNotFitError
from edgellm.fits import Board, Estimate, Fit, fit, known_boards
from edgellm.memory import MINIMAL_CONTEXT_TOKENS
from edgellm.profiles import DeviceProfile
from edgellm_buildhost.architecture import Architecture
from edgellm_buildhost.build import suggested_name
from edgellm_buildhost.checkpoint.base import TokenizerFiles
from edgellm_buildhost.checkpoint.gguf import GGUF_MAGIC, GgufCheckpoint
from edgellm_buildhost.checkpoint.hf import CONFIG_FILE
from edgellm_buildhost.checkpoint.hf_tokenizer import read_tokenizer
from edgellm_buildhost.checkpoint.settings import Settings
from edgellm_buildhost.compile import check_buildable
from edgellm_buildhost.engine_config import TOKENIZER_FILE, engine_config, engine_precision, special_tokens
from edgellm_buildhost.errors import BuildError
from edgellm_buildhost.families import read_architecture
from edgellm_buildhost.footprint import LinearForm, weights_bytes
from edgellm_buildhost.quantized import is_quantized
from edgellm_buildhost.recipe import KvName, QuantName, Recipe, Request, recipe_for

QUANTIZATIONS = ("int4", "int4-gptq", "int8")
"""What is planned for a model; `int4-awq` takes exactly as much as `int4-gptq`."""
_MAX_CONFIG_BYTES = 4 << 20  # real ones have some kilobytes; weights that were named by mistake have more
_UNKNOWN_TOKENS = SpecialTokens(eos_ids=())


@dataclass(frozen=True)
class Model:
    """What is known of a model without its weights.

    `chat_template` is assumed where no file of the tokenizer is at hand: to render one takes memory too.
    """

    name: str
    architecture: Architecture
    tokens: SpecialTokens = _UNKNOWN_TOKENS
    chat_template: bool = True


def read_model(path: Path) -> Model:
    """Reads a Hugging Face directory, a config.json, or a GGUF file; raises BuildError naming the field."""
    if path.is_dir():
        if is_quantized(path):
            raise BuildError(
                f"{path}: quantized already, and only a build tells what it takes",
                "give the bundle that `edgellm build` makes of it, or the float checkpoint",
            )
        return _from_config(path / CONFIG_FILE)
    if not path.is_file():
        raise BuildError(
            f"{path}: no such file or directory",
            "give a bundle, a Hugging Face directory, its config.json, or a .gguf file",
        )
    with path.open("rb") as file:
        if file.read(len(GGUF_MAGIC)) == GGUF_MAGIC:
            return _from_gguf(path)
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise BuildError(
            f"{path}: neither a GGUF file nor a config.json",
            "give the directory that it lies in, or its config.json",
        )
    return _from_config(path)


def estimates(path: Path) -> list[Estimate]:
    """The engines that the builds of a model would write; raises BuildError if it cannot be built."""
    return estimates_of(read_model(path))


def estimates_of(model: Model) -> list[Estimate]:
    """Every quantization, with either KV cache."""
    return [_estimate(model, name, kv) for name in QUANTIZATIONS for kv in KvName]


def check_fits(
    architecture: Architecture,
    quantization: str,
    kv: KvName,
    profile: DeviceProfile,
    *,
    form: LinearForm | None = None,
    context_tokens: int | None = None,
    max_sequences: int = 1,
) -> None:
    """Refuses a build that its board could not hold, before a weight is read.

    A profile without a limit takes everything: the machine that it will be is not known here.

    Args:
        architecture: What is to be built.
        quantization: Its name on the command line; for `auto`, as if every linear got its 4 bits.
        kv: How keys and values will be kept.
        profile: The board.
        form: How the linears are stored, where that is not the quantization's own choice.
        context_tokens: The longest sequence; None means the shortest context that a device accepts.
        max_sequences: Sequences of that length at once.

    Raises:
        DoesNotFitError: It does not fit; the hint lists what would.
        ValueError: The quantization is none that runs on a board.
    """
    if profile.usable_bytes is None:
        return
    model = Model(name=architecture.family, architecture=architecture)
    wanted = _estimate(model, quantization, kv, form)
    others = [other for other in estimates_of(model) if other.label != wanted.label]
    _check(Board.of(profile), wanted, others, context_tokens, max_sequences)


def check_built(
    config: EngineConfig,
    profile: DeviceProfile,
    *,
    context_tokens: int | None = None,
    max_sequences: int = 1,
) -> None:
    """Refuses an engine that its board could not hold; raises DoesNotFitError."""
    if profile.usable_bytes is not None:
        wanted = Estimate(config.precision.weights, config)
        _check(Board.of(profile), wanted, [], context_tokens, max_sequences)


def _check(
    board: Board, wanted: Estimate, others: list[Estimate], context_tokens: int | None, max_sequences: int
) -> None:
    longest = wanted.config.model.context_length
    if context_tokens is not None and context_tokens > longest:
        raise BuildError(
            f"--context {context_tokens}: the model takes {longest} tokens", f"ask for at most {longest}"
        )
    found = fit(board, wanted, min(context_tokens or MINIMAL_CONTEXT_TOKENS, longest), max_sequences)
    if not found.fits:
        raise DoesNotFitError(
            f"{wanted.label} needs {found.needed_bytes:,} bytes on {board.name} for {_of(max_sequences)} of "
            f"{found.context_tokens} tokens; {board.available_bytes:,} bytes are available",
            needed_bytes=found.needed_bytes,
            available_bytes=board.available_bytes,
            hint=_what_fits(board, wanted, others, found),
        )


def form_of(architecture: Architecture, quantization: str) -> LinearForm:
    """How a quantization stores linears by its own choice; raises ValueError for one that no board runs."""
    return LinearForm.of(_recipe(architecture, quantization).rounding)


def _recipe(architecture: Architecture, quantization: str) -> Recipe:
    quant = QuantName(quantization)
    if quant is QuantName.FP8:
        raise ValueError("fp8 makes a checkpoint and no engine")
    # How many of its linears `auto` keeps at 8 bits is not known before they are read.
    return recipe_for(Request(QuantName.INT4_GPTQ if quant is QuantName.AUTO else quant), architecture)


def _what_fits(board: Board, wanted: Estimate, others: list[Estimate], asked: Fit) -> str:
    """What would fit, the nearest first: another precision, a shorter or narrower use, a larger board."""
    context, sequences = asked.context_tokens, asked.max_sequences
    ways = [other.label for other in others if fit(board, other, context, sequences).fits]
    if asked.largest_context_tokens >= MINIMAL_CONTEXT_TOKENS:
        ways.append(f"{asked.largest_context_tokens} tokens of context")
    # Sorted: what holds so many sequences holds fewer.
    fewer = bisect_left(range(1, sequences), True, key=lambda n: not fit(board, wanted, context, n).fits)
    if fewer:
        ways.append(f"{_of(fewer)} at once")
    larger = next((item for item in known_boards() if fit(item, wanted, context, sequences).fits), None)
    if larger is not None:
        ways.append(f"{larger.name} or larger")
    return f"what fits: {'; '.join(ways)}" if ways else "choose a smaller model: no known board holds this"


def _of(sequences: int) -> str:
    return "1 sequence" if sequences == 1 else f"{sequences} sequences"


def _estimate(model: Model, quantization: str, kv: KvName, form: LinearForm | None = None) -> Estimate:
    """The config of a build, but for its target and its canary; raises BuildError if it cannot be built."""
    architecture = model.architecture
    check_buildable(architecture, model.name)
    form = form or form_of(architecture, quantization)
    config = engine_config(
        architecture,
        kv,
        name=suggested_name(model.name, QuantName(quantization), kv),
        profile="host",
        precision=engine_precision(
            architecture,
            kv,
            weights="int4" if form.bits == 4 else "int8",
            group_size=form.group_size,
            scheme=_recipe(architecture, quantization).scheme,
        ),
        tokens=model.tokens,
        loaded_bytes=weights_bytes(architecture, form),
        chat_template=model.chat_template,
    )
    return Estimate(quantization, config)


def _from_gguf(path: Path) -> Model:
    checkpoint = GgufCheckpoint(path)
    return _model(checkpoint.name, checkpoint.architecture, checkpoint.tokenizer)


def _from_config(path: Path) -> Model:
    config = Settings.read(path)
    architecture = read_architecture(config)
    name = path.resolve().parent.name if path.name == CONFIG_FILE else path.stem
    if (path.parent / TOKENIZER_FILE).is_file():
        return _model(name, architecture, read_tokenizer(path.parent, config))
    return Model(name, architecture, _tokens_of(config))


def _model(name: str, architecture: Architecture, tokenizer: TokenizerFiles) -> Model:
    has_template = tokenizer.chat_template is not None
    return Model(name, architecture, special_tokens(tokenizer), chat_template=has_template)


def _tokens_of(config: Settings) -> SpecialTokens:
    """As far as config.json alone tells them; no memory follows from them."""
    bos, eos = config.get("bos_token_id"), config.get("eos_token_id")
    return SpecialTokens(
        bos_id=bos if isinstance(bos, int) else None,
        eos_ids=tuple(item for item in (eos if isinstance(eos, list) else [eos]) if isinstance(item, int)),
    )
