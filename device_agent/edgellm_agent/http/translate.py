"""OpenAI's parameters to our request."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from edgellm.v1 import inference_pb2
from edgellm_agent.http.errors import ApiError
from edgellm_agent.http.schema import ChatRequest, Common, CompletionRequest

# OpenAI's default for completions; chat has none, and gets ours.
_COMPLETION_TOKENS = 16
_JSON_OBJECT = {"type": "object"}


@dataclass(frozen=True)
class Translated:
    """A request for the engine, and where each of its fields came from: an error must name the latter."""

    request: inference_pb2.GenerateRequest
    params: dict[str, str]


@dataclass(frozen=True)
class _Form:
    """A form that was asked for: by which parameter, as what kind of constraint, and its text."""

    param: str
    kind: str
    text: str


def translate_chat(call: ChatRequest) -> Translated:
    """The engine's request for a conversation; raises ApiError."""
    translated = _translate(call)
    request, params = translated.request, translated.params
    # Present even without messages: the engine says what is wrong then.
    request.chat.SetInParent()
    for message in call.messages:
        # OpenAI's newer name for the same.
        role = "system" if message.role == "developer" else message.role
        request.chat.messages.add(role=role, content=message.content)
    params["chat"] = params["chat.messages"] = "messages"
    if call.max_completion_tokens is not None:
        request.max_tokens = call.max_completion_tokens
        params["max_tokens"] = "max_completion_tokens"
    if call.logprobs:
        request.top_logprobs = call.top_logprobs or 0
    return translated


def translate_completion(call: CompletionRequest) -> Translated:
    """The engine's request for a text that goes on; raises ApiError."""
    translated = _translate(call)
    request, params = translated.request, translated.params
    request.prompt = call.prompt
    request.max_tokens = request.max_tokens or _COMPLETION_TOKENS
    if call.logprobs is not None:
        request.top_logprobs = call.logprobs
        params["top_logprobs"] = "logprobs"
    return translated


def _translate(call: Common) -> Translated:
    request = inference_pb2.GenerateRequest(
        model=call.model,
        sampling=_sampling(call),
        max_tokens=call.max_tokens or 0,
        stop=call.stop,
        ignore_eos=call.ignore_eos,
        min_tokens=call.min_tokens,
        stop_token_ids=call.stop_token_ids,
    )
    params = {}
    form = _form(call)
    if form is not None:
        setattr(request.constraint, form.kind, form.text)
        params[f"constraint.{form.kind}"] = form.param
    return Translated(request, params)


def _sampling(call: Common) -> inference_pb2.Sampling:
    return inference_pb2.Sampling(
        temperature=call.temperature,
        top_p=call.top_p,
        # Seeds may be negative there; ours are not.
        seed=None if call.seed is None else call.seed % 2**64,
        top_k=max(0, call.top_k),
        min_p=call.min_p,
        repetition_penalty=call.repetition_penalty,
        presence_penalty=call.presence_penalty,
        frequency_penalty=call.frequency_penalty,
        logit_bias=call.logit_bias,
    )


def _form(call: Common) -> _Form | None:
    """The one form that is asked for; raises ApiError if there are two."""
    forms = [
        form for form in (*_response_format(call), *_structured(call), *_guided(call)) if form is not None
    ]
    if len(forms) > 1:
        first, second = forms[0].param, forms[1].param
        raise ApiError(400, f"{second}: {first} asks for a form too; give one of them", param=second)
    return forms[0] if forms else None


def _response_format(call: Common) -> list[_Form | None]:
    given = call.response_format
    if given is None or given.type == "text":
        return []
    if given.json_schema is None:
        return [_json("response_format", _JSON_OBJECT)]
    return [_json("response_format.json_schema.schema", given.json_schema.schema_ or _JSON_OBJECT)]


def _structured(call: Common) -> list[_Form | None]:
    given = call.structured_outputs
    if given is None:
        return []
    return [
        _json("structured_outputs.json", given.json_),
        _text("structured_outputs.regex", "regex", given.regex),
        _text("structured_outputs.grammar", "lark", given.grammar),
    ]


def _guided(call: Common) -> list[_Form | None]:
    return [
        _json("guided_json", call.guided_json),
        _text("guided_regex", "regex", call.guided_regex),
        _text("guided_grammar", "lark", call.guided_grammar),
    ]


def _json(param: str, schema: dict[str, Any] | str | None) -> _Form | None:
    text = json.dumps(schema, ensure_ascii=False) if isinstance(schema, dict) else schema
    return _text(param, "json_schema", text)


def _text(param: str, kind: str, text: str | None) -> _Form | None:
    return None if text is None else _Form(param, kind, text)
