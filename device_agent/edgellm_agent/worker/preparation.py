"""Makes a sequence of a request: checked, tokenized, its constraint compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edgellm.bundle.config import EngineConfig
from edgellm.v1 import worker_pb2
from edgellm_agent.worker.requests import TooLongError, parse_request
from edgellm_agent.worker.sampler import SamplerState
from edgellm_agent.worker.sequence import Sequence, Timeline
from edgellm_agent.worker.structured import Grammars
from edgellm_agent.worker.text import PromptError, TextModel


@dataclass(frozen=True)
class Preparation:
    """What a request is checked and translated with; safe in any thread."""

    text: TextModel
    grammars: Grammars
    config: EngineConfig
    context_tokens: int
    check_fits: Callable[[int], None]
    """Raises TooLargeError for so many tokens: a context may be short for want of memory."""

    def prepare(self, submit: worker_pb2.Submit, arrived: float) -> Sequence:
        """The sequence; raises PromptError with the field that is wrong, TooLargeError or GrammarError."""
        try:
            parsed = parse_request(submit.request, self.text, self.config, self.context_tokens)
        except TooLongError as error:
            self.check_fits(error.tokens)
            raise
        if max(parsed.tokens) >= self.config.model.vocab_size:
            field = submit.request.WhichOneof("input") or "input"
            raise PromptError(field, "has a token of the tokenizer that the model does not know")
        end_ids = parsed.end_ids
        if parsed.constraint is not None:
            # The end of a grammar is the end of the answer.
            end_ids |= frozenset(self.config.tokens.eos_ids)
        matcher = None if parsed.constraint is None else self.grammars.compile(parsed.constraint)
        return Sequence(
            id=submit.id,
            client=submit.client,
            tokens=parsed.tokens,
            max_tokens=parsed.max_tokens,
            min_tokens=parsed.min_tokens,
            end_ids=end_ids,
            text=self.text.stream(parsed.stop),
            sampling=SamplerState(parsed.sampling, parsed.tokens, parsed.seed),
            matcher=matcher,
            credit=submit.credit_tokens,
            deadline=arrived + submit.deadline_s if submit.deadline_s > 0 else None,
            timeline=Timeline(arrived=arrived),
        )
