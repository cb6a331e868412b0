"""A language model behind the OpenAI API: one small interface for the bundled server, vLLM, llama.cpp or a hosted provider.

Why an AI engineer writes this first: everything above it assumes that a call returns in time, is counted, and either keeps
its promised format or fails in a way that can be handled. The `openai` client brings retries with exponential backoff and
jitter; this module adds a deadline for the whole call, a limit on calls in flight, accounting, and constrained replies.

    LLM_BASE_URL=http://127.0.0.1:8001/v1 python -m ai_engineer_track serve
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import openai
from openai import AsyncOpenAI
from pydantic import BaseModel, ConfigDict

from ai_engineer_track.settings import LlmSettings
from shared.chat import Message
from shared.logs import HEADER, request_id

BUNDLED_URL = "http://127.0.0.1:8001/v1"


class LlmUnavailable(Exception):  # noqa: N818 - the names a caller reads in an except clause
    """The model did not answer in time, after all retries. The message says what happened last."""


class LlmNonsense(Exception):  # noqa: N818
    """The model answered, but not in the form that was asked for."""


class Reply(BaseModel):
    """What came back, and what it took. `ttft` is the time to the first text of a streamed reply, in seconds."""

    model_config = ConfigDict(frozen=True)
    text: str
    model: str
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    ttft: float | None
    cost: float


class Llm:
    """One model. Temperature is 0 everywhere: the same question gets the same answer, and a fault can be reproduced."""

    def __init__(self, settings: LlmSettings) -> None:
        self.settings = settings
        self._client = AsyncOpenAI(
            base_url=settings.base_url or BUNDLED_URL,
            api_key=settings.api_key.get_secret_value() or "none",
            timeout=settings.timeout_s,
            max_retries=settings.retries,
        )
        self._places = asyncio.Semaphore(settings.concurrency)
        self._model = settings.model

    async def model(self) -> str:
        """The model's name: the one set, else the first one the server lists. LlmUnavailable when it does not say."""
        if self._model is None:
            listed = await self._within(self._client.models.list())
            names = [entry.id for entry in getattr(listed, "data", None) or []]
            if not names:
                raise LlmUnavailable("the inference server lists no model")
            self._model = names[0]
        return self._model

    @property
    def known(self) -> str:
        """What answers, by a name no other weights have: `<published version>:<variant>`, else the model's name.

        Without asking anybody: empty, or the version alone, until the server has said its name.
        """
        if self.settings.published is None:
            return self._model or ""
        return f"{self.settings.published}:{self._model.rpartition(':')[2]}" if self._model else self.settings.published

    async def identity(self) -> str:
        """`known`, asked for where it is not. LlmUnavailable when the server does not say."""
        await self.model()
        return self.known

    async def close(self) -> None:
        """Give the connections back. Nothing can be asked afterwards."""
        await self._client.close()

    async def chat(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int,
        structured: dict[str, Any] | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Reply:
        """One reply, streamed to `on_text` when given.

        `structured` is vLLM's `structured_outputs`: {"json": schema}, {"choice": [...]}, {"regex": ...} or {"grammar": lark}.
        LlmUnavailable after the retries; LlmNonsense for a reply that breaks the constraint (a server may ignore it).
        """
        request = await self._request(messages, max_tokens, structured)
        began = time.perf_counter()
        if on_text is None:
            completion = await self._within(self._client.chat.completions.create(**request))
            text, usage = _text(completion), getattr(completion, "usage", None)
            ttft = None
        else:
            text, usage, ttft = await self._within(self._stream(request, on_text, began))
        if structured:
            check_constraint(text, structured)
        spent_in, spent_out = getattr(usage, "prompt_tokens", 0) or 0, getattr(usage, "completion_tokens", 0) or 0
        return Reply(
            text=text,
            model=self.known,
            prompt_tokens=spent_in,
            completion_tokens=spent_out,
            seconds=time.perf_counter() - began,
            ttft=ttft,
            cost=(spent_in * self.settings.price_in + spent_out * self.settings.price_out) / 1e6,
        )

    async def probabilities(self, messages: Sequence[Message], choices: Sequence[str]) -> dict[str, float]:
        """How likely the model finds each of `choices` as its reply; they sum to 1.

        Read from the log probabilities of one constrained reply. A server that gives none yields 1.0 for what it chose.
        """
        structured = {"choice": list(choices)}
        request = await self._request(messages, max_tokens=64, structured=structured)
        completion = await self._within(self._client.chat.completions.create(**request, logprobs=True, top_logprobs=20))
        text = _text(completion)
        check_constraint(text, structured)
        logprobs = getattr(completion.choices[0], "logprobs", None)
        tokens = getattr(logprobs, "content", None) or []
        paths = [
            (t.token, {t.token: math.exp(t.logprob)} | {a.token: math.exp(a.logprob) for a in t.top_logprobs or []})
            for t in tokens
        ]
        return spread(choices, paths) or {choice: float(choice == text.strip()) for choice in choices}

    async def _request(self, messages: Sequence[Message], max_tokens: int, structured: dict[str, Any] | None) -> dict[str, Any]:
        request: dict[str, Any] = {
            "model": await self.model(),
            "messages": list(messages),
            "max_tokens": max_tokens,
            "temperature": 0,
        }
        if name := request_id.get():  # the inference server's log lines then name the message they belong to
            request["extra_headers"] = {HEADER: name}
        if structured:
            request["extra_body"] = {"structured_outputs": structured}
        return request

    async def _within(self, call: Any) -> Any:
        """Runs one call: a place among those in flight, a deadline over all attempts, one kind of error for every cause."""
        limit = self.settings.timeout_s * (self.settings.retries + 1)
        try:
            async with self._places, asyncio.timeout(limit):
                return await call
        except TimeoutError:
            raise LlmUnavailable(f"no reply within {limit:.0f} s") from None
        except openai.APITimeoutError:
            raise LlmUnavailable(f"no reply within {self.settings.timeout_s:.0f} s") from None
        except openai.APIStatusError as error:
            raise LlmUnavailable(f"the inference server answered with status {error.status_code}") from None
        except openai.APIConnectionError:
            raise LlmUnavailable("the inference server cannot be reached") from None
        except (openai.OpenAIError, ValueError, AttributeError, TypeError) as error:
            # A proxy's HTML page with status 200, half a JSON document: an answer, but not a reply of a model.
            raise LlmNonsense(f"not a reply of the OpenAI API ({type(error).__name__})") from None
        finally:
            if asyncio.iscoroutine(call):
                call.close()

    async def _stream(self, request: dict[str, Any], on_text: Callable[[str], None], began: float) -> tuple[str, Any, float]:
        stream = await self._client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True})
        parts: list[str] = []
        usage, ttft = None, 0.0
        async for chunk in stream:
            usage = chunk.usage or usage
            piece = (chunk.choices[0].delta.content or "") if chunk.choices else ""
            if piece:  # servers send an empty role chunk first
                ttft = ttft or time.perf_counter() - began
                parts.append(piece)
                on_text(piece)
        return "".join(parts), usage, ttft


def check_constraint(text: str, structured: dict[str, Any]) -> None:
    """LlmNonsense when a reply is not what `structured` allows. Grammars are the caller's to check: only it can parse them."""
    if "choice" in structured and text.strip() not in structured["choice"]:
        raise LlmNonsense("the reply is none of the choices")
    if "regex" in structured and not re.fullmatch(structured["regex"], text.strip()):
        raise LlmNonsense("the reply does not match its pattern")
    if "json" in structured:
        try:
            json.loads(text)
        except ValueError:
            raise LlmNonsense("the reply is not JSON") from None


def spread(choices: Sequence[str], path: Sequence[tuple[str, dict[str, float]]]) -> dict[str, float]:
    """Probability of each choice from one generated path and the alternatives beside it.

    `path` holds, for every generated token, the token and the probabilities of all reported tokens at that place. Where an
    alternative leads away from the path, its share goes to the choices that begin so. Empty without any information.
    """
    mass = dict.fromkeys(choices, 0.0)
    so_far, weight = "", 1.0
    for token, options in path:
        alive = {
            option: [c for c in choices if c.startswith(so_far + option) or (so_far + option).startswith(c)] for option in options
        }
        alive = {option: leads for option, leads in alive.items() if leads and option}
        total = sum(options[option] for option in alive)
        if token not in alive or not total:
            break
        for option, leads in alive.items():
            if option != token:
                new = [c for c in leads if c not in alive[token]] or leads
                for choice in new:
                    mass[choice] += weight * options[option] / total / len(new)
        weight *= options[token] / total
        so_far += token
        if len(alive[token]) == 1:
            mass[alive[token][0]] += weight
            weight = 0.0
            break
    total = sum(mass.values())
    return {choice: value / total for choice, value in mass.items()} if total > 0 and weight == 0.0 else {}


def _text(completion: Any) -> str:
    try:
        return str(completion.choices[0].message.content or "")
    except (AttributeError, IndexError, TypeError):
        raise LlmNonsense("not a reply of the OpenAI API") from None
