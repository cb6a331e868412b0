"""Batched greedy generation, free or under a grammar: how every variant of a model is asked, always in the same way.

Why an ML engineer needs both: a free reply shows what the model can do, a constrained one what the product will see. The
grammar is compiled by llguidance into a mask over the vocabulary at every choice; a reply outside it cannot be produced.
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
from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
            batch = [prompts[i] for i in chosen]
            if grammars is None:
                padded = tokenizer.pad({"input_ids": batch}, return_tensors="pt").to(model.device)
                output = model.generate(
                    **padded,
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    eos_token_id=stops,
                    pad_token_id=tokenizer.pad_token_id,
                )
                new = output[:, padded["input_ids"].shape[1] :].tolist()
            else:
                rules = GrammarMask(tokenizer, [grammars[i] for i in chosen], stops, model.config.vocab_size)
                new = _constrained(model, batch, rules, max_new_tokens, tokenizer.pad_token_id)
            for i, text in zip(chosen, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                replies[i] = text.strip()
            bar.update(len(chosen))
    return replies


def _constrained(
    model: PreTrainedModel, prompts: Sequence[list[int]], rules: GrammarMask, max_new_tokens: int, pad: int
) -> list[list[int]]:
    """Greedy decoding under grammars that reads what is forced at once and only steps where there is a choice.

    A grounded reply is a few choices (which sentence? another one?) and many words that follow from them. Reading those
    in one forward pass ("jump-forward decoding", Zheng et al. 2024, SGLang) is also what the inference server does.
    """
    said = rules.forced()
    pending = [prompt + tokens for prompt, tokens in zip(prompts, said, strict=True)]
    mask, cache = torch.zeros(len(prompts), 0, dtype=torch.long, device=model.device), None
    while True:
        ids, new_mask = _left_padded(pending, pad, model.device)
        mask = torch.cat([mask, new_mask], dim=1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        cache = output.past_key_values
        best = output.logits[:, -1].masked_fill(~rules.allowed(model.device), float("-inf")).argmax(-1).tolist()
        pending = []
        for tokens, step in zip(said, rules.step(best), strict=True):
            step = step[: max_new_tokens - len(tokens)]
            tokens.extend(step)
            pending.append(step)
        if all(stopped or not step for stopped, step in zip(rules.stopped(), pending, strict=True)):
            return said


def _left_padded(rows: Sequence[list[int]], pad: int, target: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both (rows, longest); the last column of a row that has any tokens is its last token."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=target)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=target)
    return ids, mask


class GrammarMask:
    """What the grammars of a batch allow next, row by row. A finished row allows its stop tokens and takes no step."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, grammars: Sequence[str], stops: Sequence[int], vocab: int) -> None:
        compiler = _compiler(tokenizer, vocab)
        self.matchers = [LLMatcher(compiler, grammar) for grammar in grammars]
        for matcher in self.matchers:
            if matcher.is_error():
                raise ValueError(f"grammar cannot be compiled: {matcher.get_error()}")
        self.stops, self.vocab = list(stops), vocab

    def allowed(self, target: torch.device) -> torch.Tensor:
        """(rows, vocab) bool."""
        masks = np.zeros((len(self.matchers), (self.vocab + 31) // 32), dtype=np.int32)
        for row, matcher in enumerate(self.matchers):
            if not matcher.is_stopped():
                matcher.unsafe_compute_mask_ptr(masks[row].ctypes.data, masks[row].nbytes)
        allowed = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")[:, : self.vocab].astype(bool)
        for row, stopped in enumerate(self.stopped()):
            if stopped:
                allowed[row, self.stops] = True
        return torch.from_numpy(allowed).to(target)

    def step(self, chosen: Sequence[int]) -> list[list[int]]:
        """Take the chosen token of every row; returns it with the tokens that now have to follow."""
        taken: list[list[int]] = []
        for matcher, token in zip(self.matchers, chosen, strict=True):
            taken.append([] if matcher.is_stopped() else [token])
            if taken[-1]:
                matcher.consume_token(token)
        return [before + after for before, after in zip(taken, self.forced(), strict=True)]

    def forced(self) -> list[list[int]]:
        """The tokens every row has to say next, taken."""
        tokens = [[] if matcher.is_stopped() else list(matcher.compute_ff_tokens()) for matcher in self.matchers]
        for matcher, row in zip(self.matchers, tokens, strict=True):
            if row:
                matcher.consume_tokens(row)
        return tokens

    def stopped(self) -> list[bool]:
        return [matcher.is_stopped() for matcher in self.matchers]


@lru_cache(maxsize=4)
def _compiler(tokenizer: PreTrainedTokenizerBase, vocab: int) -> Any:
    """llguidance's view of a tokenizer; building one takes up to a second, so it is kept."""
    return llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocab)
