"""Reads the tokenizer of a Hugging Face directory: file, template, and the ids that begin and end a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from edgellm_buildhost.checkpoint.base import TokenizerFiles
from edgellm_buildhost.checkpoint.settings import FETCH_AGAIN, Settings
from edgellm_buildhost.errors import BuildError


def read_tokenizer(directory: Path, config: Settings) -> TokenizerFiles:
    """What the directory says of its tokenizer, `config` being its config.json.

    Raises BuildError naming the file and field.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise BuildError(
            f"{path}: missing",
            "save the tokenizer in its fast form first: "
            "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)",
        )
    data = path.read_bytes()
    tokenizer = _tokenizer(path, data)
    settings = Settings.read_if_there(directory / "tokenizer_config.json")
    # Of a multimodal model, the ids may stand with its language model.
    sources = [Settings.read_if_there(directory / "generation_config.json"), config]
    sources += [text for text in [config.section("text_config")] if text is not None]
    eos_ids = _first_ids(sources, "eos_token_id")
    if not eos_ids:
        raise BuildError(
            f"{config.path}: eos_token_id is missing, generation would never end",
            'add "eos_token_id" to generation_config.json',
        )
    bos = _token_id(tokenizer, settings.get("bos_token"))
    bos = next(iter(_first_ids(sources, "bos_token_id")), None) if bos is None else bos
    return TokenizerFiles(
        tokenizer_json=data,
        chat_template=_chat_template(directory, settings),
        bos_id=bos,
        eos_ids=_template_end_first(eos_ids, _token_id(tokenizer, settings.get("eos_token"))),
        add_bos=_adds(tokenizer, bos, settings),
    )


def _tokenizer(path: Path, data: bytes) -> Tokenizer:
    try:
        return Tokenizer.from_str(data.decode())
    except Exception as error:  # the library raises a bare Exception
        raise BuildError(f"{path}: not a tokenizer that can be read: {error}", FETCH_AGAIN) from error


def _first_ids(sources: list[Settings], field: str) -> tuple[int, ...]:
    """The ids of the first source that has the field."""
    for source in sources:
        value = source.get(field)
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not ids or not all(
            isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in ids
        ):
            raise source.wrong(field, "a token id or a list of them")
        return tuple(dict.fromkeys(ids))
    return ()


def _token_id(tokenizer: Tokenizer, token: Any) -> int | None:
    """Id of a token as tokenizer_config.json names it: by its text, or by an object that holds it."""
    text = token.get("content") if isinstance(token, dict) else token
    found = tokenizer.token_to_id(text) if isinstance(text, str) else None
    return None if found is None else int(found)


def _template_end_first(eos_ids: tuple[int, ...], template_eos: int | None) -> tuple[int, ...]:
    """The same ids; first the one that a chat template means by `eos_token`."""
    if template_eos not in eos_ids or template_eos is None:
        return eos_ids
    return (template_eos, *(item for item in eos_ids if item != template_eos))


def _adds(tokenizer: Tokenizer, bos: int | None, settings: Settings) -> bool:
    """Whether a text begins with `bos`.

    `add_bos_token` has the last word, as in transformers; without it (Llama 3), what the tokenizer's own
    post-processor does counts. A device encodes without that, and puts `bos` in front by this flag.
    """
    if settings.get("add_bos_token") is not None:
        return settings.flag("add_bos_token")
    return bos is not None and tokenizer.encode("", add_special_tokens=True).ids[:1] == [bos]


def _chat_template(directory: Path, settings: Settings) -> str | None:
    """A file of its own; else what tokenizer_config.json, or the processor of a multimodal model, has."""
    path = directory / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    processor = Settings.read_if_there(directory / "chat_template.json")
    return _default_template(settings.get("chat_template")) or _default_template(
        processor.get("chat_template")
    )


def _default_template(template: Any) -> str | None:
    """One template, or the one called `default` where a model has several, or the only one of a list."""
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default", next(iter(named.values())) if len(named) == 1 else None)
    return template if isinstance(template, str) else None
