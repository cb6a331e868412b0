"""The CPU engine: openvino-genai's continuous batching over a GGUF file.

Why this one: on two cores it decodes 32 chats at many times the rate of one-at-a-time `generate`, it reuses the cache of
shared prefixes, and requests in one batch may each have a grammar of their own.

Three things it cannot do are done around it, in the open:

* *Grammars over long texts.* Compiling one takes the engine about a second, in the middle of everybody's batch (xgrammar
  prepares a mask for every place in the text). When every terminal is a fixed text, most of a reply follows from what stands
  before it, so the reply is decoded by **jumping**: llguidance, in this process, says which tokens follow anyway; only where
  several may follow is the engine asked, for one token, under a grammar of just these. Quoting 60 sentences costs one small
  question per decision instead of one step per token, and the masks of such questions are shared by all requests.
* *Log probabilities of several choices.* The engine tells only the one of the token it took. With `choice` and `logprobs` every
  choice is therefore scored whole (its tokens echoed after the prompt) by a second, small pipeline without prefix cache (with
  one, echoed tokens lack their figures), and the reply is drawn from these scores. Its price: the weights a second time (for a
  large model only from the first such request on). Elsewhere `top_logprobs` has one entry.
* *Failed steps.* A step that raises leaves the pipeline unusable, so a new one is built and only that batch is lost.

With a `draft` a smaller model proposes DRAFT_TOKENS tokens, of which a step of the large one keeps those it would have said
itself (speculative.py). A prompt must then enter in one step: the engine (2026.4) says tokens twice when one is cut in two.

A step holds Python's interpreter lock, so the server gives this engine a process of its own (engine_process.py). A `seed` is
reproducible only while nothing else is sampled: the engine has one random generator for all requests.
"""

from __future__ import annotations

import math
import random
import sys
from collections import deque
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import llguidance.hf
import numpy as np
from llguidance import LLMatcher
from transformers import AutoConfig, PreTrainedTokenizerBase

from ml_engineer_track.serving.engine import DoesNotFit, Engine, Finish, Generation, Job, Token
from ml_engineer_track.serving.grammar import Either, GrammarError, Text, to_ebnf
from shared.errors import UserError

# Its conversion tools report home through this package when it is there; without it they use their own stub.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

BLOCK = 32
MAX_BATCHED_TOKENS = 512
#: Tokens that a draft model proposes for each step.
DRAFT_TOKENS = 4
#: Prepared kernels kept, one for every length of prompt met in each kind of layer. OpenVINO's own limit, 5,000, is some 2 MB for
#: each new length and grows for hours; with 128 memory stays level and a step takes no longer (measured on this CPU engine).
KERNELS_KEPT = 128
#: Grammars asked of a pipeline before it is built anew, in the next moment without a request: it keeps every compiled one (some
#: kilobytes each, and cannot be told to forget), and quotations ask for new ones all day.
GRAMMARS_KEPT = 4_000
#: Longest prompt with choice a scored request may have: the second pipeline has a cache of its own.
SCORED_TOKENS = 4096
#: Up to this size of the model file the second pipeline is loaded at the start instead of stopping everybody later.
SMALL_FILE = 2**28


@dataclass
class Jump:
    """A reply under a grammar of fixed texts: where llguidance stands, and the question now asked of the engine."""

    matcher: LLMatcher
    handle: Any = None


@dataclass
class Scoring:
    """The choices of a request: tokens of each (with the end token), and their log probabilities once they are known."""

    choices: list[list[int]]
    scores: list[list[float]] = field(default_factory=list)


class OpenVinoEngine(Engine):
    """`path` is a GGUF file; its model's config.json and tokenizer lie beside it. UserError when it cannot be loaded."""

    name = "openvino"
    block = BLOCK

    def __init__(
        self, path: Path, tokenizer: PreTrainedTokenizerBase, stops: list[int], cache_mb: int, max_running: int, max_waiting: int,
        draft: Path | None = None,
    ) -> None:  # fmt: skip
        super().__init__(max_running, max_waiting)
        self.draft = draft
        self.config = AutoConfig.from_pretrained(path.parent)
        self.path, self.tokenizer, self.stops, self.cache_mb = path, tokenizer, stops, cache_mb
        self.pipeline: Any = None
        self.scorer: Any = None
        self.scoring: Any = None
        self.to_score: deque[tuple[Job, int]] = deque()
        self.number = 0
        self.grammars = 0

    def check(self, generation: Generation) -> None:
        if generation.constraint is not None and generation.constraint.literal:
            check_lark(generation.constraint.lark, compiler(self.tokenizer, self.config.vocab_size))
        if scored(generation) and len(generation.prompt) > SCORED_TOKENS - 2 * BLOCK:
            raise DoesNotFit(f"logprobs over choices take prompts of up to {SCORED_TOKENS - 2 * BLOCK} tokens here")

    # --- loading ---

    def do_load(self) -> None:
        size, spare = block_bytes(self.config), 1
        if self.draft is not None:  # it has a cache of as many blocks; proposals may take one more for each request
            size, spare = size + block_bytes(AutoConfig.from_pretrained(self.draft)), 1 + self.max_running
        blocks = max(self.cache_mb * 2**20 // size, spare + 1)
        self.pipeline = self.load(blocks, prefix_caching=True, draft=self.draft)
        self.capacity_tokens = (blocks - spare) * BLOCK
        if self.path.stat().st_size <= SMALL_FILE:
            self.scorer = self.load_scorer()

    def load_scorer(self) -> Any:
        return self.load(SCORED_TOKENS // BLOCK + 1, prefix_caching=False)

    def load(self, blocks: int, prefix_caching: bool, draft: Path | None = None) -> Any:
        import openvino_genai

        settings = openvino_genai.SchedulerConfig()
        settings.num_kv_blocks = blocks
        settings.enable_prefix_caching = prefix_caching
        settings.max_num_batched_tokens = MAX_BATCHED_TOKENS
        settings.max_num_seqs = self.max_running
        properties: dict[str, Any] = {"CPU_RUNTIME_CACHE_CAPACITY": KERNELS_KEPT}
        if draft is not None:
            settings.dynamic_split_fuse = False  # whole prompts only
            settings.max_num_batched_tokens = max(MAX_BATCHED_TOKENS, self.config.get_text_config().max_position_embeddings)
            properties["draft_model"] = openvino_genai.draft_model(str(draft), "CPU")
        try:
            return openvino_genai.ContinuousBatchingPipeline(str(self.path), settings, "CPU", properties)
        except RuntimeError as error:
            last = str(error).strip().splitlines()[-1][:160]
            raise UserError(f"openvino-genai cannot load the model: {last}", str(self.path), "Publish it again") from None

    # --- the batch ---

    def do_begin(self, job: Job) -> None:
        wanted = job.generation
        if scored(wanted):
            assert wanted.constraint is not None
            self.begin_scoring(job, wanted.constraint.choices)
        elif wanted.constraint is not None and wanted.constraint.literal:
            job.state = Jump(LLMatcher(compiler(self.tokenizer, self.config.vocab_size), wanted.constraint.lark))
            self.jump(job)
        else:
            ebnf = wanted.constraint.ebnf if wanted.constraint else None
            job.state = self.ask(wanted.prompt, wanted.max_tokens, wanted, ebnf)

    def do_step(self) -> None:
        if self.pipeline.has_non_finished_requests():
            self.pipeline.step()
        for job in list(self.running):
            if isinstance(job.state, Jump):
                self.read_jump(job)
            elif not isinstance(job.state, Scoring):
                self.read(job)
        self.score_one()

    def do_stop(self, job: Job) -> None:
        if isinstance(job.state, Scoring):
            self.to_score = deque(item for item in self.to_score if item[0] is not job)
        else:
            handle = job.state.handle if isinstance(job.state, Jump) else job.state
            if handle is not None:
                handle.cancel()

    def do_recover(self) -> None:
        self.to_score.clear()
        self.scorer = self.pipeline = None  # before the next is built: two at once might not fit
        spare = 1 if self.draft is None else 1 + self.max_running
        self.pipeline = self.load(self.capacity_tokens // BLOCK + spare, prefix_caching=True, draft=self.draft)

    def do_rest(self) -> None:
        if self.grammars >= GRAMMARS_KEPT:
            self.grammars = 0
            self.do_recover()

    def ask(self, prompt: list[int], max_tokens: int, wanted: Generation, ebnf: str | None) -> Any:
        """Queue a prompt in the pipeline; a handle to read it by."""
        import openvino_genai

        config = self.settings(max_tokens, wanted.logprobs)
        config.ignore_eos = wanted.ignore_eos
        if self.draft is not None:
            config.num_assistant_tokens = DRAFT_TOKENS
        if wanted.temperature > 0:
            config.do_sample, config.temperature, config.top_p = True, wanted.temperature, wanted.top_p
            config.rng_seed = random.getrandbits(31) if wanted.seed is None else wanted.seed % 2**31
        if wanted.ignore_eos:
            config.stop_token_ids = set()
        if ebnf is not None:
            self.grammars += 1
            config.structured_output_config = openvino_genai.StructuredOutputConfig(grammar=ebnf)
        return self.add(self.pipeline, prompt, config)

    def settings(self, max_tokens: int, logprobs: bool) -> Any:
        import openvino_genai

        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = max_tokens
        config.eos_token_id = self.stops[0]
        config.stop_token_ids = set(self.stops)
        config.apply_chat_template = False
        config.logprobs = int(logprobs)
        return config

    def add(self, pipeline: Any, prompt: list[int], config: Any) -> Any:
        import openvino

        self.number += 1
        return pipeline.add_request(self.number, openvino.Tensor(np.array([prompt], dtype=np.int64)), config)

    def read(self, job: Job) -> None:
        """Hand on what an ordinary request got in this step."""
        tokens = self.new_tokens(job.state, job.generation.logprobs)
        self.emit(job, tokens, self.finish_of(job, tokens))

    def new_tokens(self, handle: Any, logprobs: bool) -> list[Token]:
        found: list[Token] = []
        while handle.can_read():
            for output in handle.read().values():
                values = output.generated_log_probs if logprobs else [None] * len(output.generated_ids)
                alternatives = [((i, v),) if v is not None else () for i, v in zip(output.generated_ids, values, strict=True)]
                found += map(Token, output.generated_ids, values, alternatives)
        return found

    def finish_of(self, job: Job, tokens: list[Token]) -> Finish | None:
        import openvino_genai

        status = job.state.get_status()
        if status == openvino_genai.GenerationStatus.RUNNING:
            return None
        if status != openvino_genai.GenerationStatus.FINISHED:
            job.stream.error = f"the engine gave the request up ({status.name})"
            return "failed"
        ended = bool(tokens) and tokens[-1].id in self.stops and not job.generation.ignore_eos
        return "stop" if ended or job.remaining > len(tokens) else "length"

    # --- grammars of fixed texts ---

    def jump(self, job: Job) -> None:
        """Emit what must follow; where several tokens may, ask the engine for one of them."""
        state: Jump = job.state
        state.handle = None
        while True:
            if state.matcher.is_error():
                raise RuntimeError(f"grammar: {state.matcher.get_error()}")
            if state.matcher.is_stopped() or job.remaining == 0:
                return self.emit(job, [], "stop" if state.matcher.is_stopped() else "length")
            forced = state.matcher.compute_ff_tokens()[: job.remaining]
            if not forced:
                break
            state.matcher.consume_tokens(forced)
            self.emit(job, [Token(i) for i in forced])
        texts, may_stop = self.allowed(state.matcher)
        texts = [text for text in texts if "\ufffd" not in text]  # a part of a character cannot be asked for
        if not texts:
            raise RuntimeError("choices that differ inside a character are not supported")
        options = Either(tuple(Text(text) for text in (*texts, *([""] if may_stop else []))))
        state.handle = self.ask([*job.generation.prompt, *job.tokens], 1, job.generation, to_ebnf({"root": options}))
        return None

    def read_jump(self, job: Job) -> None:
        """The engine's choice, if it has come, and what follows from it."""
        state: Jump = job.state
        tokens = self.new_tokens(state.handle, job.generation.logprobs)
        if not tokens:
            return None
        if tokens[0].id in self.stops:
            return self.emit(job, tokens[:1], "stop")
        if not state.matcher.consume_token(tokens[0].id):
            raise RuntimeError(f"the engine chose token {tokens[0].id}, which the grammar does not allow")
        self.emit(job, tokens[:1])
        return self.jump(job)

    def allowed(self, matcher: LLMatcher) -> tuple[list[str], bool]:
        """The texts of the tokens that may follow, and whether the reply may end here."""
        words = np.zeros((self.config.vocab_size + 31) // 32, dtype=np.int32)
        matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        ids = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()
        texts = [str(self.tokenizer.decode([i])) for i in ids if i not in self.stops]
        return texts, any(i in self.stops for i in ids)

    # --- log probabilities of choices ---

    def begin_scoring(self, job: Job, choices: tuple[str, ...]) -> None:
        if self.scorer is None:
            self.scorer = self.load_scorer()
        encoded = [self.tokenizer(choice, add_special_tokens=False)["input_ids"] + self.stops[:1] for choice in choices]
        job.state = Scoring(encoded, [[] for _ in encoded])
        self.to_score.extend((job, n) for n in range(len(encoded)))

    def score_one(self) -> None:
        """Score the next choice of whoever waits longest; one a step, so that other requests go on meanwhile."""
        if not self.to_score:
            return
        job, n = self.to_score.popleft()
        choice = job.state.choices[n]
        config = self.settings(1, logprobs=True)
        config.echo = True
        handle = self.add(self.scorer, [*job.generation.prompt, *choice], config)
        values: list[float] = []
        while self.scorer.has_non_finished_requests():
            self.scorer.step()
            while handle.can_read():
                values += [v for output in handle.read().values() for v in output.generated_log_probs]
        start = len(job.generation.prompt)
        job.state.scores[n] = values[start : start + len(choice)]
        if len(job.state.scores[n]) != len(choice):
            raise RuntimeError(f"{len(values)} log probabilities for {start + len(choice)} tokens")
        if all(job.state.scores):
            tokens = draw(job.state, job.generation)
            cut = tokens[: job.generation.max_tokens]
            self.emit(job, cut, "stop" if len(cut) == len(tokens) else "length")


def block_bytes(config: Any) -> int:
    """Bytes of one block at two bytes a value: keys and values of BLOCK tokens in every layer."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * 2 * BLOCK * config.num_hidden_layers * config.num_key_value_heads * head)


def scored(generation: Generation) -> bool:
    return generation.logprobs and generation.constraint is not None and bool(generation.constraint.choices)


def draw(scoring: Scoring, generation: Generation) -> list[Token]:
    """One choice, token by token down their tree: the likeliest branch, or at a temperature one drawn by its probability."""
    chance = random.Random(generation.seed)
    path: list[int] = []
    found: list[Token] = []
    while True:
        branches: dict[int, float] = {}
        for choice, values in zip(scoring.choices, scoring.scores, strict=True):
            if choice[: len(path)] == path and len(choice) > len(path):
                branches[choice[len(path)]] = values[len(path)]
        if not branches:
            return found
        best = sorted(branches.items(), key=lambda item: -item[1])
        taken = best[0]
        if generation.temperature > 0:
            weights = [math.exp((value - best[0][1]) / generation.temperature) for _, value in best]
            taken = chance.choices(best, weights)[0]
        path.append(taken[0])
        found.append(Token(taken[0], taken[1], tuple(best[: max(generation.top_logprobs, 1)])))


@lru_cache(maxsize=4)
def compiler(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Any:
    """llguidance's view of a tokenizer; building one takes up to a second, so it is kept."""
    return llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocab_size)  # type: ignore[arg-type]


def check_lark(lark: str, tokenizer: Any) -> None:
    """GrammarError when llguidance cannot compile it; what `grammar.py` writes should always pass."""
    if error := LLMatcher.validate_grammar(lark, tokenizer):
        raise GrammarError(error.strip().splitlines()[0][:300])
