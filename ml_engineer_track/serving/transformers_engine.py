"""The CUDA engine, and the fallback where openvino-genai has no wheel: transformers' continuous batching.

Why a second engine: it serves what transformers loads (bf16, NF4, INT8, any architecture) with paged attention, on a GPU.
One logits processor does everything a request may ask for, row by row: llguidance's mask, temperature, top_p, a random
generator of its own (so a seed holds whatever else is in the batch), and log probabilities with alternatives. It picks the token
itself and leaves the library no other choice.

Sizes of the cache are always given: the library's own defaults took 8 GB for four short requests. On a CPU it decodes more
slowly than static batches would; there it is the fallback, not the choice.
"""

from __future__ import annotations

import queue
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList, PreTrainedTokenizerBase
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.requests import FutureRequestState, GenerationOutput, RequestStatus

from ml_engineer_track.models import load_merged, load_model
from ml_engineer_track.serving.engine import Engine, Generation, Job, Token
from ml_engineer_track.serving.openvino_engine import check_lark, compiler

PAGE = 32
MAX_BATCH_TOKENS = 1024
#: How long a step waits for the first token of anybody.
POLL_SECONDS = 0.05


@dataclass
class Row:
    """What one request needs at every step. `told` are the tokens chosen for it, with their log probabilities."""

    number: str
    wanted: Generation
    matcher: LLMatcher | None
    chance: torch.Generator | None
    told: list[Token]


class TransformersEngine(Engine):
    """`path` is a model folder as `from_pretrained` takes it, `adapter` a LoRA adapter to merge into it.

    With `packed`, its linear layers are packed to 4 bits and multiplied by our own kernel. UserError when it cannot be loaded.
    """

    name = "transformers"
    block = PAGE

    def __init__(
        self, path: str, tokenizer: PreTrainedTokenizerBase, stops: list[int], cache_mb: int, max_running: int, max_waiting: int,
        adapter: str | None = None, packed: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(max_running, max_waiting)
        self.path, self.tokenizer, self.stops, self.cache_mb, self.adapter = path, tokenizer, stops, cache_mb, adapter
        self.packed = packed
        self.rows: dict[str, Row] = {}
        self.jobs: dict[str, Job] = {}
        self.number = 0

    def check(self, generation: Generation) -> None:
        if generation.constraint is not None:
            check_lark(generation.constraint.lark, compiler(self.tokenizer, self.config.vocab_size))

    def do_load(self) -> None:
        self.model = load_merged(self.path, self.adapter) if self.adapter else load_model(self.path)
        if self.packed:
            from ml_engineer_track.kernels.linear import pack_linears, warm_up  # Triton takes a second to import, and few pack

            pack_linears(self.model, self.path)
            warm_up(self.model)
        self.config = self.model.config.get_text_config()
        c = self.config
        head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        page_bytes = 2 * self.model.dtype.itemsize * PAGE * c.num_hidden_layers * c.num_key_value_heads * head
        self.blocks = max(self.cache_mb * 2**20 // page_bytes, 2)
        self.start_batches()
        self.capacity_tokens = (self.blocks - 1) * PAGE

    def start_batches(self) -> None:
        sizes = ContinuousBatchingConfig(
            page_size=PAGE, num_blocks=self.blocks, max_batch_tokens=MAX_BATCH_TOKENS, max_requests_per_batch=self.max_running,
            per_request_processors=True, use_async_batching=False, use_cuda_graph=False,
        )  # fmt: skip
        model: Any = self.model
        greedy = GenerationConfig(do_sample=False, eos_token_id=self.stops, pad_token_id=self.tokenizer.pad_token_id)
        self.manager = model.init_continuous_batching(generation_config=greedy, continuous_batching_config=sizes)
        chooser = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([Chooser(self.rows, self.stops)]))
        chooser.tensors_required = 1
        self.manager.logit_processor = chooser
        self.manager.start()

    def do_begin(self, job: Job) -> None:
        self.number += 1
        wanted, number = job.generation, str(self.number)
        matcher = chance = None
        if wanted.constraint is not None:
            matcher = LLMatcher(compiler(self.tokenizer, self.config.vocab_size), wanted.constraint.lark)
        if wanted.temperature > 0:
            chance = torch.Generator(self.model.device)
            chance.seed() if wanted.seed is None else chance.manual_seed(wanted.seed)
        job.state = self.rows[number] = Row(number, wanted, matcher, chance, [])
        self.jobs[number] = job
        ends = [-1] if wanted.ignore_eos else self.stops
        added = self.manager.add_request(
            wanted.prompt, request_id=number, max_new_tokens=wanted.max_tokens, streaming=True, eos_token_id=ends
        )
        if added is None:
            raise RuntimeError("the engine takes no requests any more")

    def do_step(self) -> None:
        result = self.manager.get_result(timeout=POLL_SECONDS)
        while result is not None:
            self.read(result)
            try:
                result = self.manager.output_router.output_queue.get_nowait()
            except queue.Empty:
                result = None
        if not self.manager.is_running():
            raise RuntimeError(f"continuous batching stopped: {self.manager.background_thread_status.fatal_error}")

    def read(self, result: GenerationOutput) -> None:
        job = self.jobs.get(result.request_id)
        if job is None:
            return None  # cancelled in the meantime
        if result.status == RequestStatus.FAILED:
            self.forget(job)
            job.stream.error = f"the engine failed: {str(result.error)[:200]}"
            return self.emit(job, [], "failed")
        new = result.generated_tokens[len(job.tokens) :]
        tokens = job.state.told[len(job.tokens) : len(job.tokens) + len(new)]
        if not result.is_finished():
            return self.emit(job, tokens)
        self.forget(job)
        ended = bool(new) and new[-1] in self.stops and not job.generation.ignore_eos
        return self.emit(job, tokens, "stop" if ended else "length")

    def forget(self, job: Job) -> None:
        self.jobs.pop(job.state.number, None)
        self.rows.pop(job.state.number, None)

    def do_stop(self, job: Job) -> None:
        self.manager.cancel_request(job.state.number)
        self.forget(job)

    def do_recover(self) -> None:
        self.jobs.clear()
        self.rows.clear()
        self.manager.stop(block=True, timeout=10)
        self.start_batches()

    def close(self) -> None:
        super().close()
        if hasattr(self, "manager"):
            self.manager.stop(block=True, timeout=10)


class Chooser(ContinuousBatchingLogitsProcessor):
    """Chooses the next token of every row and leaves only that one possible."""

    supported_kwargs: dict[str, type] = {}  # noqa: RUF012 - the base class reads it from the class
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self, rows: dict[str, Row], stops: list[int]) -> None:
        self.rows, self.stops = rows, stops
        self.batch: list[Row | None] = []

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[FutureRequestState]) -> torch.Tensor:
        """Called just before the batch runs: remembers which request each row of its logits belongs to."""
        self.batch = [self.rows.get(request.state.request_id) for request in requests_with_new_token]
        return torch.zeros(len(self.batch), dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        """Scores (rows, vocab) with everything but the chosen tokens at -inf."""
        allowed = self.allowed(scores)
        masked = scores if allowed is None else scores.masked_fill(~allowed, float("-inf"))
        chosen = masked.argmax(dim=-1)
        for place, row in enumerate(self.batch):
            if row is not None and row.chance is not None:
                chosen[place] = sample(masked[place], row.wanted, row.chance)
        for place, (row, token) in enumerate(zip(self.batch, chosen.tolist(), strict=False)):
            if row is not None:
                row.told.append(tell(scores[place], None if allowed is None else allowed[place], token, row.wanted))
                if row.matcher is not None and not row.matcher.is_stopped():
                    row.matcher.consume_token(token)
        return torch.full_like(scores, float("-inf")).scatter_(1, chosen[:, None], 0.0)

    def allowed(self, scores: torch.Tensor) -> torch.Tensor | None:
        """Which tokens each row's grammar allows (rows, vocab); None when no row has one."""
        constrained = [
            (place, row.matcher) for place, row in enumerate(self.batch) if row is not None and row.matcher is not None
        ]
        if not constrained:
            return None
        vocab = scores.shape[1]
        allowed = torch.ones_like(scores, dtype=torch.bool)
        words = np.zeros((len(constrained), (vocab + 31) // 32), dtype=np.int32)
        for n, (_, matcher) in enumerate(constrained):
            if not matcher.is_stopped():
                matcher.unsafe_compute_mask_ptr(words[n].ctypes.data, words[n].nbytes)
        bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")[:, :vocab].astype(bool)
        for n, (_, matcher) in enumerate(constrained):
            if matcher.is_stopped():
                bits[n, self.stops] = True
        allowed[[place for place, _ in constrained]] = torch.from_numpy(bits).to(scores.device)
        return allowed


def sample(scores: torch.Tensor, wanted: Generation, chance: torch.Generator) -> torch.Tensor:
    """One token drawn at the request's temperature from the smallest set of tokens that holds `top_p` of the probability."""
    probabilities = torch.softmax(scores.float() / wanted.temperature, dim=-1)
    if wanted.top_p < 1:
        ordered, ids = probabilities.sort(descending=True)
        ordered[ordered.cumsum(0) - ordered >= wanted.top_p] = 0.0
        return ids[torch.multinomial(ordered, 1, generator=chance)][0]
    return torch.multinomial(probabilities, 1, generator=chance)[0]


def tell(scores: torch.Tensor, allowed: torch.Tensor | None, token: int, wanted: Generation) -> Token:
    """The token with the model's own log probability; its alternatives are the best of those its grammar allows."""
    if not wanted.logprobs:
        return Token(token)
    values = torch.log_softmax(scores.float(), dim=-1)
    best = (values if allowed is None else values.masked_fill(~allowed, float("-inf"))).topk(max(wanted.top_logprobs, 1))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return Token(token, float(values[token]), tuple((i, v) for i, v in pairs if v > float("-inf")))
