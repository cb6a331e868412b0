"""One request of the API, from its prompt to its last chunk: the part between HTTP and the engine.

A reply that is streamed and one that is not are the same events; the one is sent as they come, the other collected. The first
event is awaited before a status is sent, so that a request the engine fails at once gets 503 and not a broken stream.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from ml_engineer_track.models import prompt_text
from ml_engineer_track.serving import protocol
from ml_engineer_track.serving.engine import Busy, DoesNotFit, Engine, Generation, Stream, Token
from ml_engineer_track.serving.grammar import GrammarError, constraint
from ml_engineer_track.serving.metrics import Meters
from ml_engineer_track.serving.protocol import ApiError, ChatRequest, CompletionRequest
from ml_engineer_track.serving.text import TextStream

LEAST = 1e-4  # smaller temperatures and top_p are zero to an engine's arithmetic: greedy, and the likeliest token
COMPLETION_MAX_TOKENS = 16  # OpenAI's default for plain completions


@dataclass(frozen=True)
class Served:
    """A model the server answers for. `context` is the longest prompt and reply together, in tokens.

    `parent` is the name of the base model when this one is a LoRA adapter on top of it.
    """

    name: str
    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    context: int
    parent: str | None = None


@dataclass(frozen=True)
class Event:
    """Something new in choice `index`; `finish` ends it."""

    index: int
    text: str
    tokens: list[Token]
    finish: str | None


@dataclass
class Run:
    """A request in the engine: its streams (one a choice) and what it used so far."""

    served: Served
    streams: list[Stream]
    stops: list[str]
    prompt_tokens: int
    meters: Meters
    started: float = field(default_factory=time.perf_counter)
    completion_tokens: int = 0

    def usage(self) -> dict[str, int]:
        return protocol.usage(self.prompt_tokens, self.completion_tokens)

    def cancel(self) -> None:
        for stream in self.streams:
            stream.cancel()

    async def events(self) -> AsyncGenerator[Event]:
        """Events of all choices as they come. ApiError 503 when the engine fails; leaving early cancels what still runs."""
        choices = [self._read(i, stream) for i, stream in enumerate(self.streams)]
        merged = choices[0] if len(choices) == 1 else _merged(choices)  # one choice needs no tasks and no second queue
        try:
            async for event in merged:
                yield event
            self.meters.finished(self.served.name, time.perf_counter() - self.started)
        finally:
            self.cancel()
            await merged.aclose()

    async def _read(self, index: int, stream: Stream) -> AsyncGenerator[Event]:
        text = TextStream(self.served.tokenizer, self.stops)
        async for tokens in stream:
            if self.completion_tokens == 0:
                self.meters.first_token(self.served.name, time.perf_counter() - self.started)
            piece = text.add(tokens)
            self.completion_tokens += len(piece.tokens)
            self.meters.tokens(self.served.name, len(piece.tokens))
            if piece.stopped:
                stream.cancel()
                yield Event(index, piece.text, piece.tokens, "stop")
                return
            # The end travels with the last token: one event less for every reply.
            ended = stream.finish if stream.finish in ("stop", "length") else None
            yield Event(index, piece.text + (text.rest() if ended else ""), piece.tokens, ended)
            if ended:
                return
        if stream.finish not in ("stop", "length"):
            message = stream.error or "the server is shutting down"
            raise ApiError(503, message, "engine_failed" if stream.error else "shutting_down")
        yield Event(index, text.rest(), [], stream.finish)


async def _merged(choices: Sequence[AsyncGenerator[Event]]) -> AsyncGenerator[Event]:
    """What all of them give, as it comes; the first error ends it."""
    queue: asyncio.Queue[Event | Exception | None] = asyncio.Queue()

    async def read(choice: AsyncGenerator[Event]) -> None:
        try:
            async for event in choice:
                queue.put_nowait(event)
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    readers = [asyncio.create_task(read(choice)) for choice in choices]
    try:
        open_choices = len(readers)
        while open_choices:
            event = await queue.get()
            if isinstance(event, Exception):
                raise event
            if event is None:
                open_choices -= 1
            else:
                yield event
    finally:
        for reader in readers:
            reader.cancel()


def begin_chat(served: Served, request: ChatRequest, meters: Meters) -> Run:
    """ApiError 400 for a conversation the model's template refuses."""
    try:
        text = prompt_text(served.tokenizer, [message.plain() for message in request.messages])
    except Exception as error:  # templates raise what they like
        raise ApiError(400, f"the chat template refuses these messages: {error}", param="messages") from None
    prompt = served.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    limit = request.max_completion_tokens or request.max_tokens
    return _begin(served, [prompt], limit, request, bool(request.logprobs), request.top_logprobs or 0, meters)


def begin_completion(served: Served, request: CompletionRequest, meters: Meters) -> Run:
    prompts = []
    for prompt in request.prompts():
        ids = served.tokenizer(prompt, add_special_tokens=False)["input_ids"] if isinstance(prompt, str) else prompt
        if not ids or any(not 0 <= i < len(served.tokenizer) for i in ids):
            raise ApiError(400, f"a prompt must have tokens between 0 and {len(served.tokenizer) - 1}", param="prompt")
        prompts.append(ids)
    limit = request.max_tokens or COMPLETION_MAX_TOKENS
    return _begin(served, prompts, limit, request, request.logprobs is not None, request.logprobs or 0, meters)


def _begin(
    served: Served, prompts: Sequence[list[int]], limit: int | None, request: ChatRequest | CompletionRequest,
    logprobs: bool, top_logprobs: int, meters: Meters,
) -> Run:  # fmt: skip
    if len(prompts) * (request.n or 1) > protocol.MAX_CHOICES * 8:
        raise ApiError(400, f"{len(prompts)} prompts times n = {request.n or 1} are too many", param="n")
    try:
        wanted = request.constraint()
        held_to = constraint(wanted) if wanted is not None else None
    except GrammarError as error:
        raise ApiError(400, str(error), "invalid_constraint", "structured_outputs") from None
    # A seeded request with several choices must not get the same choice several times.
    seeds = random.Random(request.seed)
    streams: list[Stream] = []
    warmth = 1.0 if request.temperature is None else request.temperature
    try:
        for prompt in prompts:
            most = served.context - len(prompt)
            if (limit or 1) > most:
                raise ApiError(
                    400,
                    f"this model reads and writes at most {served.context} tokens; the prompt has {len(prompt)} and "
                    f"{limit or 1} were asked for",
                    "context_length_exceeded",
                    "messages" if isinstance(request, ChatRequest) else "prompt",
                )
            for number in range(request.n or 1):
                generation = Generation(
                    prompt=prompt,
                    max_tokens=limit or most,
                    temperature=0.0 if warmth < LEAST else warmth,
                    top_p=max(1.0 if request.top_p is None else request.top_p, LEAST),
                    seed=None if request.seed is None else abs(request.seed) if number == 0 else seeds.getrandbits(31),
                    constraint=held_to,
                    logprobs=logprobs,
                    top_logprobs=top_logprobs,
                    ignore_eos=request.ignore_eos,
                )
                streams.append(served.engine.submit(generation))
    except (Busy, DoesNotFit, GrammarError, ApiError) as error:
        for stream in streams:
            stream.cancel()
        raise _refusal(error) from None
    return Run(served, streams, request.stops(), sum(map(len, prompts)), meters)


def _refusal(error: Exception) -> ApiError:
    if isinstance(error, Busy):
        return ApiError(429, f"{error}; try again later", "queue_full", headers={"Retry-After": str(error.retry_after)})
    if isinstance(error, DoesNotFit):
        return ApiError(400, str(error), "does_not_fit")
    if isinstance(error, GrammarError):
        return ApiError(400, str(error), "invalid_constraint", "structured_outputs")
    assert isinstance(error, ApiError)
    return error


# --- the two answers -------------------------------------------------------------------------------------------------


class Answer:
    """The bodies of one request: `chat` in the layout of chat completions, else in that of plain ones."""

    def __init__(self, run: Run, chat: bool, logprobs: bool) -> None:
        self.run, self.chat, self.logprobs = run, chat, logprobs
        self.head = {
            "id": protocol.new_id("chatcmpl" if chat else "cmpl"),
            "created": protocol.now(),
            "model": run.served.name,
        }

    async def whole(self) -> dict[str, Any]:
        texts = ["" for _ in self.run.streams]
        tokens: list[list[Token]] = [[] for _ in self.run.streams]
        ends = ["" for _ in self.run.streams]
        async for event in self.run.events():
            texts[event.index] += event.text
            tokens[event.index] += event.tokens
            ends[event.index] = event.finish or ends[event.index]
        choices = []
        for index, (text, end) in enumerate(zip(texts, ends, strict=True)):
            content = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
            choices.append({"index": index, **content, "logprobs": self.told(tokens[index]), "finish_reason": end})
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self.head, "object": kind, "choices": choices, "usage": self.run.usage()}

    async def chunks(self, include_usage: bool) -> AsyncGenerator[str]:
        """Server-sent events, each a whole `data:` line; an engine that fails on the way sends an error body as the last one."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        head = json.dumps({**self.head, "object": kind})[:-1]
        tail = ', "usage": null}' if include_usage else "}"
        events = self.run.events()
        event: Event | None = await anext(events)  # before anything is sent: an error now is a status, not a broken stream
        before = ""
        try:
            if self.chat:
                first = [{"index": i, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
                         for i in range(len(self.run.streams))]  # fmt: skip
                before = f'data: {head}, "choices": {json.dumps(first)}{tail}\n\n'
            while event is not None:
                if event.text or event.finish or self.logprobs:
                    delta = json.dumps(self.delta(event), ensure_ascii=False)
                    yield f'{before}data: {head}, "choices": [{delta}]{tail}\n\n'  # the roles go with the first word
                    before = ""
                event = await anext(events, None)
            if include_usage:
                yield f'data: {head}, "choices": [], "usage": {json.dumps(self.run.usage())}}}\n\n'
        except ApiError as error:
            yield f"data: {json.dumps(error.body())}\n\n"
        finally:
            await events.aclose()
        yield "data: [DONE]\n\n"

    def delta(self, event: Event) -> dict[str, Any]:
        content: dict[str, Any] = {"text": event.text}
        if self.chat:
            content = {"delta": {"content": event.text} if event.text or not event.finish else {}}
        return {"index": event.index, **content, "logprobs": self.told(event.tokens), "finish_reason": event.finish}

    def told(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        """Log probabilities; 0.0, certain, for tokens a grammar left no choice about."""
        if not self.logprobs or (self.chat is False and not tokens):
            return None
        entries = [{**self.one(token.id, token.logprob or 0.0),
                    "top_logprobs": [self.one(i, v) for i, v in token.alternatives]} for token in tokens]  # fmt: skip
        if self.chat:
            return {"content": entries, "refusal": None}
        return {
            "tokens": [entry["token"] for entry in entries],
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": [{top["token"]: top["logprob"] for top in entry["top_logprobs"]} for entry in entries],
            "text_offset": [],
        }

    def one(self, token: int, logprob: float) -> dict[str, Any]:
        text = str(self.run.served.tokenizer.decode([token]))
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}
