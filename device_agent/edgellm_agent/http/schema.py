"""What a request's body may say: OpenAI's parameters, and vLLM's names for what OpenAI lacks.

A parameter that would change the answer and cannot be honoured is refused, never dropped in silence.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import pydantic
import pydantic_core
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from edgellm_agent.http.errors import ApiError

# They bill, route or label; the answer is the same without them.
_IGNORED = frozenset(
    (
        "metadata",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
    )
)
# Values by which clients say that they do not want what is not here.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "n": (1,),
    "reasoning_effort": ("none",),
    "suffix": ("",),
    "tool_calls": ([],),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "use_beam_search": (False,),
}
_UINT32 = 2**32 - 1

Parameters = TypeVar("Parameters", bound="Common")
TokenId = Annotated[int, Field(ge=0, le=_UINT32)]
# JSON has no integer keys.
TokenIdKey = Annotated[int, Field(strict=False, ge=0, le=_UINT32)]


def _one_or_many(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _joined_text(content: object) -> object:
    """Content parts as one text."""
    if not isinstance(content, list):
        return content
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise _refusal(f"part {i} is no text; this device takes parts of type text alone")
    return "".join(part["text"] for part in content)


def _one_prompt(prompt: object) -> object:
    if not isinstance(prompt, list):
        return prompt
    if len(prompt) != 1 or not isinstance(prompt[0], str):
        raise _refusal("must be one text: no token ids, and one prompt a request")
    return prompt[0]


def _refusal(message: str) -> PydanticCustomError:
    return PydanticCustomError("refused", "{message}", {"message": message})


class _Part(BaseModel):
    """An object of the body. A number is a number, and a text is a text."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, given: object) -> object:
        if not isinstance(given, dict):
            return given
        return {
            name: value
            for name, value in given.items()
            if value is not None and name not in _IGNORED and value not in _NEUTRAL.get(name, ())
        }


class JsonSchemaFormat(_Part):
    """A JSON Schema with a name. `strict` or not, it is enforced."""

    name: str
    description: str = ""
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool = True


class ResponseFormat(_Part):
    """OpenAI's way to ask for JSON."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise _refusal("json_schema goes with the type json_schema, and that with it")
        return self


class StructuredOutputs(_Part):
    """vLLM's way to ask for a form; a grammar is Lark here."""

    # The name `json` would hide a method of BaseModel.
    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    regex: str | None = None
    grammar: str | None = None


class StreamOptions(_Part):
    """What a stream has beside the answer."""

    include_usage: bool = False
    # Padding against guessing by packet size: nothing leaves the machine here.
    include_obfuscation: bool = False


class Common(_Part):
    """What both kinds of completion may ask for. Ranges that are the engine's are checked by the engine."""

    model: str = ""
    temperature: float = 1.0
    top_p: float | None = None
    max_tokens: int | None = Field(default=None, ge=1, le=_UINT32)
    stop: Annotated[list[str], BeforeValidator(_one_or_many)] = []
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    logit_bias: dict[TokenIdKey, float] = {}
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    response_format: ResponseFormat | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str = Field(default="", max_length=256)

    # vLLM's.
    top_k: int = Field(default=0, ge=-1, le=_UINT32)
    min_p: float = 0.0
    repetition_penalty: float | None = None
    min_tokens: int = Field(default=0, ge=0, le=_UINT32)
    ignore_eos: bool = False
    stop_token_ids: list[TokenId] = []
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_grammar: str | None = None

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Common:
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options goes with stream = true", param="stream_options")
        return self


class Message(_Part):
    """One message of a conversation."""

    role: str
    content: Annotated[str, BeforeValidator(_joined_text)]


class ChatRequest(Common):
    """Body of POST /v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: int | None = Field(default=None, ge=1, le=_UINT32)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=_UINT32)

    @model_validator(mode="after")
    def _alternatives_of_something(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs goes with logprobs = true", param="top_logprobs")
        return self


class CompletionRequest(Common):
    """Body of POST /v1/completions."""

    prompt: Annotated[str, BeforeValidator(_one_prompt)]
    logprobs: int | None = Field(default=None, ge=0, le=_UINT32)


def parse(kind: type[Parameters], body: bytes) -> Parameters:
    """The body, checked; raises ApiError with the first parameter that is wrong."""
    try:
        # Unlike json.loads, it bounds the depth and takes neither NaN nor half a surrogate pair.
        given = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None
    try:
        return kind.model_validate(given)
    except pydantic.ValidationError as error:
        raise _to_api_error(error) from None


def _to_api_error(error: pydantic.ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_input=False)[0]
    path = ""
    for part in first["loc"]:
        # pydantic's mark of a wrong key, after the key.
        if part == "[key]":
            continue
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    param, message, code = path.lstrip("."), first["msg"], None
    if first["type"] == "extra_forbidden":
        neutral = " or ".join(repr(value) for value in _NEUTRAL.get(str(first["loc"][-1]), ()))
        message, code = (
            "not supported" + (f", unless it is {neutral}" if neutral else ""),
            "unsupported_parameter",
        )
    return ApiError(400, f"{param or 'the body'}: {message}", param=param or None, code=code)
