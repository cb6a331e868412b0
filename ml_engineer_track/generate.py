"""Batched greedy generation, free or under a grammar: how every variant of a model is asked, always in the same way.

Why an ML engineer needs both: a free reply shows what the model can do, a constrained one what the product will see. The
grammar is compiled by llguidance into a mask over the vocabulary at every step; a reply outside it cannot be produced.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import llguidance
import llguidance.hf
import numpy as np
import torch
from llguidance import LLMatcher
from pydantic import BaseModel
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from ml_engineer_track.models import prompt_text, stop_token_ids
from ml_engineer_track.progress import progress
from shared.chat import Message


def json_grammar(schema: type[BaseModel]) -> str:
    """Compact JSON of a schema: no free whitespace, in which a weak model would wander for ever."""
    return str(
        LLMatcher.grammar_from_json_schema(json.dumps(schema.model_json_schema()), overrides={"whitespace_flexible": False})
    )


def lark_grammar(text: str) -> str:
    """A grammar in llguidance's Lark dialect, as `shared.chat.grounded_grammar` writes it."""
    return str(LLMatcher.grammar_from_lark(text))


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    max_new_tokens: int,
    batch_size: int,
    grammars: Sequence[str] | None = None,
    name: str = "generate",
) -> list[str]:
    """Greedy replies, in the order of `conversations`; one grammar per conversation where given.

    Rows are batched by length and padded on the left. ValueError for a grammar llguidance cannot compile.
    """
    prompts = [tokenizer(prompt_text(tokenizer, c), add_special_tokens=False)["input_ids"] for c in conversations]
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    replies = [""] * len(prompts)
    stops = stop_token_ids(model, tokenizer)
    with progress(name, total=len(prompts)) as bar:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = tokenizer.pad({"input_ids": [prompts[i] for i in chosen]}, return_tensors="pt").to(model.device)
            processors = LogitsProcessorList()
            if grammars is not None:
                processors.append(GrammarMask(tokenizer, [grammars[i] for i in chosen], stops, model.config.vocab_size))
            output = model.generate(
                **batch,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=stops,
                pad_token_id=tokenizer.pad_token_id,
                logits_processor=processors,
            )
            new = output[:, batch["input_ids"].shape[1] :]
            for i, text in zip(chosen, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                replies[i] = text.strip()
            bar.update(len(chosen))
    return replies


class GrammarMask(LogitsProcessor):
    """Forbids, at every step and in every row, the tokens that row's grammar does not allow."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, grammars: Sequence[str], stops: Sequence[int], vocab: int) -> None:
        compiler = _compiler(tokenizer, vocab)
        self.matchers = [LLMatcher(compiler, grammar) for grammar in grammars]
        for matcher in self.matchers:
            if matcher.is_error():
                raise ValueError(f"grammar cannot be compiled: {matcher.get_error()}")
        self.stops = list(stops)
        self.words = (vocab + 31) // 32
        self.seen = -1

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """`input_ids` (rows, so far) and `scores` (rows, vocab) as transformers passes them; returns masked scores."""
        if self.seen >= 0:
            for matcher, token in zip(self.matchers, input_ids[:, -1].tolist(), strict=True):
                if not matcher.is_stopped():
                    matcher.consume_token(token)
        self.seen = input_ids.shape[1]
        masks = np.zeros((len(self.matchers), self.words), dtype=np.int32)
        for row, matcher in enumerate(self.matchers):
            if not matcher.is_stopped():
                matcher.unsafe_compute_mask_ptr(masks[row].ctypes.data, masks[row].nbytes)
        allowed = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")[:, : scores.shape[1]].astype(bool)
        for row, matcher in enumerate(self.matchers):
            if matcher.is_stopped():
                allowed[row, self.stops] = True
        return scores.masked_fill(~torch.from_numpy(allowed).to(scores.device), float("-inf"))


@lru_cache(maxsize=4)
def _compiler(tokenizer: PreTrainedTokenizerBase, vocab: int) -> Any:
    """llguidance's view of a tokenizer; building one takes up to a second, so it is kept."""
    return llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocab)
