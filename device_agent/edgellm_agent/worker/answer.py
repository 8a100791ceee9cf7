"""Turns chosen tokens into an answer: text, stops, log probabilities, and why it ends."""

from __future__ import annotations

from typing import TypeAlias

from edgellm.v1 import inference_pb2, worker_pb2
from edgellm_agent.worker.sampler import Choice, Draw
from edgellm_agent.worker.sequence import Sequence
from edgellm_agent.worker.text import TokenTable

FinishReason: TypeAlias = "inference_pb2.FinishReason.ValueType"
GOES_ON = inference_pb2.FINISH_REASON_UNSPECIFIED


def draw(sequence: Sequence) -> Draw:
    """What the sampler must know to choose the sequence's next token."""
    early = sequence.generated < sequence.min_tokens
    if sequence.matcher is None:
        return Draw(sequence.sampling, banned=tuple(sequence.end_ids) if early else ())
    # A grammar that has come to its end ends the answer, however few tokens it has.
    allowed = sequence.matcher.allowed()
    may_go_on = early and not sequence.matcher.ended
    return Draw(sequence.sampling, banned=tuple(sequence.end_ids) if may_go_on else (), allowed=allowed)


def append(sequence: Sequence, choice: Choice, delta: worker_pb2.Delta, table: TokenTable) -> FinishReason:
    """Adds a chosen token to the sequence, and what its reader gets to the delta.

    Returns why the answer ends with it; GOES_ON if it does not.
    """
    token = choice.token
    if token in sequence.end_ids:
        delta.text += sequence.text.finish()
        return inference_pb2.FINISH_REASON_STOP
    sequence.tokens.append(token)
    sequence.sampling.push(token)
    sequence.credit -= 1
    delta.token_ids.append(token)
    if choice.logprob is not None:
        delta.logprobs.append(_logprob(choice, choice.logprob, table))
    delta.text += sequence.text.push(token, may_stop=sequence.generated >= sequence.min_tokens)
    if sequence.matcher is not None:
        sequence.matcher.accept(token)
    if sequence.text.stopped:
        return inference_pb2.FINISH_REASON_STOP
    if sequence.matcher is not None and sequence.matcher.ended:
        delta.text += sequence.text.finish()
        return inference_pb2.FINISH_REASON_STOP
    if sequence.generated == sequence.max_tokens:
        delta.text += sequence.text.finish()
        return inference_pb2.FINISH_REASON_LENGTH
    return GOES_ON


def finished(sequence: Sequence, reason: FinishReason, kv_bytes: int) -> worker_pb2.Finished:
    """The summary of an answer."""
    t, account = sequence.timeline, sequence.account
    return worker_pb2.Finished(
        reason=reason,
        usage=inference_pb2.Usage(
            prompt_tokens=sequence.prompt_tokens,
            completion_tokens=sequence.generated,
            kv_bytes=kv_bytes,
            cached_tokens=account.cached,
            recomputed_tokens=account.recomputed,
            draft_tokens=account.drafted,
            accepted_draft_tokens=account.accepted,
        ),
        timings=inference_pb2.Timings(
            queue_s=t.started - t.arrived,
            ttft_s=t.first_token - t.arrived,
            decode_s=t.last_token - t.first_token,
        ),
    )


def _logprob(choice: Choice, logprob: float, table: TokenTable) -> inference_pb2.TokenLogprob:
    def chance(token: int, value: float) -> inference_pb2.TokenChance:
        return inference_pb2.TokenChance(id=token, logprob=value, text=table[token])

    top = [chance(token, value) for token, value in choice.top]
    return inference_pb2.TokenLogprob(token=chance(choice.token, logprob), top=top)
