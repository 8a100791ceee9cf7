"""A bundle's chat template may do what templates do, and neither hang, nor grow, nor look around."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from edgellm_agent.worker import template_process
from edgellm_agent.worker.template import ChatTemplate, TemplateRefusedError
from tests.support.chat_templates import BOMBS, FAMILIES

VARIABLES = {
    "messages": [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Grüß dich, 世界"},
    ],
    "add_generation_prompt": True,
    "bos_token": "<s>",
    "eos_token": "</s>",
}

EXPECTED = {
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHi.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nGrüß dich, 世界<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "gemma": (
        "<s><start_of_turn>user\nBe kind.\n\nHello<end_of_turn>\n<start_of_turn>model\nHi.<end_of_turn>\n"
        "<start_of_turn>user\nGrüß dich, 世界<end_of_turn>\n<start_of_turn>model\n"
    ),
    "phi": (
        "<|system|>\nBe kind.<|end|>\n<|user|>\nHello<|end|>\n<|assistant|>\nHi.<|end|>\n"
        "<|user|>\nGrüß dich, 世界<|end|>\n<|assistant|>\n"
    ),
    "mistral": "<s>[INST] Hello[/INST] Hi.</s>[INST] Be kind.\n\nGrüß dich, 世界[/INST]",
    **dict.fromkeys(
        ("qwen2.5", "qwen3", "smollm2"),
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\nHi.<|im_end|>\n<|im_start|>user\nGrüß dich, 世界<|im_end|>\n"
        "<|im_start|>assistant\n",
    ),
}


# Ours; then the interpreter's, by its version: what it parses, compiles or reads as a number has bounds, too.
TOO_MUCH = (
    r"^(it takes too much (memory|processor time)|it is nested too deeply|it makes more than 4 MiB of text"
    r"|it has more than 256 KiB|Exceeds the limit \(4300 digits\) .*|too many nested parentheses.*"
    r"|too many statically nested blocks.*)$"
)


@pytest.fixture
def made():
    templates = []

    def make(source):
        templates.append(ChatTemplate(source))
        return templates[-1]

    yield make
    for template in templates:
        template.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_templates_as_models_have_them_are_rendered(made, family):
    assert made(FAMILIES[family]).render(VARIABLES) == EXPECTED[family]


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_that_takes_too_much_is_refused_and_says_why(made, name):
    with pytest.raises(TemplateRefusedError, match=TOO_MUCH):
        made(BOMBS[name]).render(VARIABLES)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{% import '/etc/passwd' as p %}",
        "{{ raise_exception('never') }}",
        "{{ 1 / 0 }}",
        "{{ nowhere.at.all }}",
        "{{ '\\ud800' }}",
    ],
)
def test_a_template_that_reaches_for_more_or_fails_is_refused(made, source):
    with pytest.raises(TemplateRefusedError):
        made(source).render(VARIABLES)


def test_what_is_no_template_is_refused_at_once():
    with pytest.raises(TemplateRefusedError, match="endfor"):
        ChatTemplate("{% for m in messages %}")


def test_after_a_text_that_took_too_much_the_next_is_rendered(made):
    template = made("{% for m in messages %}{% for i in range(m.content|int) %}{% for k in range(99999) %}"
                    "{% endfor %}{% endfor %}{{ m.content }}{% endfor %}")  # fmt: skip
    heavy, light = ({"messages": [{"content": content}]} for content in ("9999", "0"))
    with pytest.raises(TemplateRefusedError, match="processor time"):
        template.render(heavy)
    assert template.render(light) == "0"


def test_no_text_leaves_anything_to_the_next(made):
    template = made("{{ cycler('a', 'b').next() }}{% set x = (x or '') ~ messages[0] %}{{ x }}")
    assert [template.render({"messages": [text]}) for text in ("1", "2")] == ["a1", "a2"]


def test_a_process_that_was_killed_is_started_again(made):
    template = made("{{ messages[0] }}")
    os.kill(template._process.pid, signal.SIGKILL)
    with pytest.raises(TemplateRefusedError, match="failed"):
        template.render({"messages": ["a"]})
    assert template.render({"messages": ["a"]}) == "a"


def test_the_process_can_open_nothing_and_goes_with_its_template(made):
    template = made("{{ messages[0] }}")
    process = template._process
    limits = Path(f"/proc/{process.pid}/limits").read_text().splitlines()
    assert any(line.split()[:4] == ["Max", "open", "files", "0"] for line in limits)
    template.close()
    assert process.returncode == 0


def test_the_longest_text_that_may_be_comes_whole(made):
    text = "ä" * (template_process.MAX_TEXT_BYTES // 2)
    template = made("{{ messages }}")
    assert template.render({"messages": text}) == text
    with pytest.raises(TemplateRefusedError, match="more than 4 MiB"):
        template.render({"messages": text + "x"})
