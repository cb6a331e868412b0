"""The sides of the engine comparison: the same chats through a server, through its engine without one, and `model.generate`.

Why in one file: a ratio of two engines means something only when both got the same work. Every side takes a list of chats and
gives back what happened to each, as benchmarks/load.py has it. No prompt is ever asked twice: the second time an engine would
answer it from its cache. Replies have a fixed number of tokens on every side.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.load import Answer, Ask, Load, Target, closed_loop
from benchmarks.serving import text
from ml_engineer_track.models import load_model, load_tokenizer, prompt_text
from ml_engineer_track.quantize import save_gguf
from ml_engineer_track.serving.catalog import Limits, build, entries
from ml_engineer_track.serving.engine import Generation
from shared.hardware import synchronize
from shared.settings import BASE_MODEL


@dataclass(frozen=True)
class Side:
    """One engine at one concurrency. A turn of it is `chats` chats; `timed`: it knows when each token came."""

    name: str
    concurrency: int
    chats: int
    run: Callable[[Sequence[Ask]], Load]
    timed: bool = True
    note: str = ""


@dataclass
class Chats:
    """Chats that are never repeated: about `prompt_tokens` in, exactly `new_tokens` out."""

    tokens_per_word: float
    prompt_tokens: int
    new_tokens: int
    seed: int
    number: itertools.count[int] = field(default_factory=itertools.count)

    def take(self, count: int) -> list[Ask]:
        numbers = itertools.islice(self.number, count)
        prompts = [text(self.tokens_per_word, self.prompt_tokens, f"{self.seed}/engines/{n}") for n in numbers]
        return [Ask(prompt, self.new_tokens) for prompt in prompts]


def over_http(name: str, target: Target, concurrency: int, chats: int, note: str = "") -> Side:
    """`concurrency` clients of a server, who ask until all chats are answered."""

    def run(asks: Sequence[Ask]) -> Load:
        return asyncio.run(closed_loop(target, asks, concurrency, 0.0, len(asks)))

    return Side(name, concurrency, chats, run, note=note)


# --- the server's engine, called directly ----------------------------------------------------------------------------


@dataclass
class Running:
    """A chat inside the engine, and when its last token came."""

    handle: Any
    wanted: int
    started: float
    answer: Answer
    last: float = 0.0


class InProcess:
    """The engine the server uses for a GGUF folder, with the same settings: no queue, no thread, no text, no HTTP.

    UserError where the CPU engine is not installed or cannot load the file.
    """

    def __init__(self, folder: Path) -> None:
        from ml_engineer_track.serving.openvino_engine import OpenVinoEngine

        (entry,) = entries(folder, [], "openvino", folder)
        served = build(entry, Limits())
        assert isinstance(served.engine, OpenVinoEngine)
        self.engine, self.tokenizer = served.engine, served.tokenizer
        self.engine.do_load()

    def side(self, concurrency: int, chats: int) -> Side:
        return Side("the same engine in process, Q8_0", concurrency, chats, partial(self.run, concurrency))

    def run(self, concurrency: int, asks: Sequence[Ask]) -> Load:
        """The chats in order, `concurrency` at a time; the clock starts when they are tokens already."""
        waiting = deque((self.prompt(ask.prompt), ask.output_tokens) for ask in asks)
        running: list[Running] = []
        answers: list[Answer] = []
        start = time.perf_counter()
        while waiting or (running and self.engine.pipeline.has_non_finished_requests()):
            while waiting and len(running) < concurrency:
                ids, wanted = waiting.popleft()
                handle = self.engine.ask(ids, wanted, Generation(ids, wanted, ignore_eos=True), None)
                answers.append(Answer(status=200, prompt_tokens=len(ids)))
                running.append(Running(handle, wanted, time.perf_counter(), answers[-1]))
            self.engine.pipeline.step()
            now = time.perf_counter()
            for chat in running:
                self.read(chat, now)
            running = [chat for chat in running if not chat.answer.ok]
        return Load(answers, time.perf_counter() - start)

    def prompt(self, words: str) -> list[int]:
        whole = prompt_text(self.tokenizer, [{"role": "user", "content": words}])
        return list(self.tokenizer(whole, add_special_tokens=False)["input_ids"])

    def read(self, chat: Running, now: float) -> None:
        new = len(self.engine.new_tokens(chat.handle, logprobs=False))
        if not new:
            return
        if chat.answer.output_tokens:
            chat.answer.itl.append(now - chat.last)
        else:
            chat.answer.ttft = now - chat.started
        chat.answer.output_tokens += new
        chat.answer.e2el, chat.last = now - chat.started, now
        chat.answer.ok = chat.answer.output_tokens >= chat.wanted


# --- transformers without a server -----------------------------------------------------------------------------------


class Generate:
    """`model.generate` in float32: one chat at a time, or static batches padded on the left."""

    def __init__(self, folder: str) -> None:
        self.model, self.tokenizer = load_model(folder, torch.float32), load_tokenizer(folder)

    def one_at_a_time(self, chats: int) -> Side:
        return Side("model.generate, one at a time", 1, chats, partial(self.run, 1), timed=False)

    def static_batch(self, size: int) -> Side:
        return Side(f"model.generate, static batch of {size}", size, size, partial(self.run, size), timed=False)

    @torch.no_grad()
    def run(self, batch: int, asks: Sequence[Ask]) -> Load:
        answers: list[Answer] = []
        start = time.perf_counter()
        for first in range(0, len(asks), batch):
            rows = asks[first : first + batch]
            texts = [prompt_text(self.tokenizer, [{"role": "user", "content": ask.prompt}]) for ask in rows]
            encoded = self.tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt").to(self.model.device)
            wanted = rows[0].output_tokens
            model: Any = self.model
            model.generate(
                input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"], max_new_tokens=wanted,
                min_new_tokens=wanted, do_sample=False, pad_token_id=self.tokenizer.pad_token_id,
            )  # fmt: skip
            synchronize(self.model.device)
            lengths = encoded["attention_mask"].sum(dim=1).tolist()
            answers += [Answer(ok=True, status=200, prompt_tokens=length, output_tokens=wanted) for length in lengths]
        return Load(answers, time.perf_counter() - start)


# --- model files -----------------------------------------------------------------------------------------------------


def gguf_folders(model: str, into: Path) -> dict[str, Path]:
    """The model as Q8_0 and as Q4_0, each a folder the server takes. UserError for a model the format does not know."""
    loaded, tokenizer = load_model(model, torch.float32), load_tokenizer(model)
    folders = {kind: into / kind for kind in ("q8_0", "q4_0")}
    for kind, folder in folders.items():
        save_gguf(loaded, tokenizer, folder, kind)
    return folders


#: 96 million parameters
RANDOM_SIZES: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 2560, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 4,
}  # fmt: skip


def random_model(folder: Path, seed: int, sizes: dict[str, Any] = RANDOM_SIZES) -> None:
    """A Llama with random weights and the bundled tokenizer: what it says means nothing, what it costs does.

    Tokens without a text of their own (control tokens, parts of characters) get zero rows in the tied embedding and so never
    win: every step of the stream can then be seen by a client.
    """
    tokenizer = load_tokenizer(str(BASE_MODEL))
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **sizes,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    texts = [tokenizer.decode([i], skip_special_tokens=True) for i in range(len(tokenizer))]
    mute = [i for i, shown in enumerate(texts) if not shown or "\ufffd" in shown]
    with torch.no_grad():
        model.get_input_embeddings().get_parameter("weight")[mute] = 0.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
