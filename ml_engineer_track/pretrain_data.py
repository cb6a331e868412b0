"""What the base model is trained on, as tensors: a tokenizer, token files, and the batches of every step.

Why an ML engineer keeps this apart from the loop: what a step shows is a pure function of the seed and the step number. That
is what makes a killed run resumable to the last digit, and a surprising loss something one can look at.

    python -m ml_engineer_track pretrain --corpus FOLDER      (this module is part of it; it has no command of its own)
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ml_engineer_track.corpus import Corpus
from ml_engineer_track.reading import Exercise, Exercises
from shared import chat

if TYPE_CHECKING:
    from ml_engineer_track.pretrain import Edition

PAD, END, SYSTEM, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# Words and spaces as GPT-4 and Qwen2 cut them, digits one by one: a changed number is then a changed token.
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
#: exercises whose reply begins with a choice: the number of a sentence, or that none answers
READS = frozenset("quiz find consult define section squad_reading medquad_reading choose_question".split())
#: share of each source among the language rows: health text comes several times as often as its size
LANGUAGE_MIX = {
    "health_openstax": 0.22,
    "health_biology_philschatz": 0.05,
    "health_medquad_1_to_6": 0.25,
    "general_openstax": 0.22,
    "general_wikipedia": 0.18,
    "fiction_eltec_eng": 0.08,
}


def train_tokenizer(corpus: Corpus, edition: Edition, folder: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE on a health-weighted sample; [1] to [60] are one token each. Reused when already there."""
    if not (folder / "tokenizer.json").exists():
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        bpe.decoder = decoders.ByteLevel()
        marks = [AddedToken(f"[{n}]", normalized=False) for n in range(1, chat.MAX_SOURCES + 1)]
        specials = [PAD, END, SYSTEM, USER, ASSISTANT]
        trainer = trainers.BpeTrainer(
            vocab_size=edition.vocab - len(marks),
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        bpe.train_from_iterator(_tokenizer_sample(corpus), trainer)
        bpe.add_tokens(marks)
        fast = PreTrainedTokenizerFast(
            tokenizer_object=bpe,
            pad_token=PAD,
            eos_token=END,
            model_max_length=edition.context,
            clean_up_tokenization_spaces=False,
            additional_special_tokens=[SYSTEM, USER, ASSISTANT],
            chat_template=CHAT_TEMPLATE,
        )
        fast.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def write_token_files(corpus: Corpus, tokenizer: PreTrainedTokenizerFast, folder: Path) -> dict[str, np.ndarray]:
    """One flat uint16 file a source, documents ended by the end token; memory-mapped. Reused when complete."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, documents in corpus.documents.items():
        path = folder / f"{name}.bin"
        if not path.exists():
            parts = []
            for start in range(0, len(documents), 256):
                batch = tokenizer(documents[start : start + 256], verbose=False)["input_ids"]
                parts.extend(np.asarray([*ids, tokenizer.eos_token_id], dtype=np.uint16) for ids in batch)
            part = path.with_suffix(".part")
            np.concatenate(parts).tofile(part)
            part.rename(path)
    return {name: np.memmap(folder / f"{name}.bin", dtype=np.uint16, mode="r") for name in corpus.documents}


class Batches(Dataset):
    """Batch number `step` of the run: a pure function of the seed and the step, so a resumed run sees the same data.

    Each item is (ids, reply, language), all (batch, length): ids int64; reply float32, the weight of a token a model
    must say; language bool, a token of text that is given.
    """

    def __init__(
        self, exercises: Exercises, tokens: dict[str, np.ndarray], tokenizer: PreTrainedTokenizerFast, edition: Edition
    ) -> None:
        self.exercises, self.tokens, self.tokenizer, self.edition = exercises, tokens, tokenizer, edition
        self.marks = {tokenizer.convert_tokens_to_ids(f"[{n}]") for n in range(1, chat.MAX_SOURCES + 1)}
        self.assistant = tokenizer.convert_tokens_to_ids(ASSISTANT)

    def __len__(self) -> int:
        return self.edition.steps

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        stage = self.edition.stage_at(step)
        rng = random.Random(f"{self.edition.seed}/{step}")
        ids = np.full((stage.batch, stage.length), self.tokenizer.pad_token_id, dtype=np.int64)
        replies = np.zeros((stage.batch, stage.length), dtype=np.float32)
        language = np.zeros((stage.batch, stage.length), dtype=bool)
        kinds = rng.choices(list(stage.mix), weights=list(stage.mix.values()), k=stage.batch)
        for row, kind in enumerate(kinds):
            if kind == "language":
                ids[row], language[row] = self._language(rng, stage.length), True
                continue
            n = stage.length + 1
            while n > stage.length:
                made = self.exercises.make(kind, rng, int(stage.length * rng.uniform(0.85 if stage.length < 300 else 0.6, 0.97)))
                prompt, reply = encode(made, self.tokenizer)
                n = len(prompt) + len(reply)
            ids[row, :n] = prompt + reply
            language[row, : len(prompt)] = True
            replies[row, len(prompt) : n] = self._weights(kind, made.reply, reply)
        return torch.from_numpy(ids), torch.from_numpy(replies), torch.from_numpy(language)

    def _weights(self, kind: str, text: str, reply: list[int]) -> list[float]:
        """Tokens that decide (marks, how a reading's reply begins, JSON values) weigh `mark_weight`, copied ones 1."""
        given = 0.0 if kind in ("index", "quiz") else 1.0  # the words between their numbers are not the model's to guess
        before = [self.assistant, *reply]
        weights = [
            self.edition.mark_weight if t in self.marks or (b == self.assistant and kind in READS) else given
            for b, t in zip(before, reply, strict=False)
        ]
        if text.startswith("{") and kind != "fields":
            offsets = self.tokenizer.backend_tokenizer.encode(text).offsets
            for i, (start, end) in enumerate(offsets):
                if any(start < b and a < end for a, b in chat.choices(text)):
                    weights[i] = self.edition.mark_weight
        return weights

    def _language(self, rng: random.Random, length: int) -> np.ndarray:
        source = rng.choices(list(LANGUAGE_MIX), weights=list(LANGUAGE_MIX.values()))[0]
        stream = self.tokens[source]
        start = rng.randrange(max(1, len(stream) - length))
        window = stream[start : start + length].astype(np.int64)
        return np.pad(window, (0, length - len(window)), constant_values=self.tokenizer.eos_token_id)


def encode(exercise: Exercise, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """Token ids of prompt and reply. The chat template written out: Jinja is too slow for every training row."""
    prompt = "".join(f"<|{m['role']}|>{m['content']}{END}" for m in exercise.messages) + ASSISTANT
    both = tokenizer([prompt, exercise.reply + END], add_special_tokens=False, verbose=False)["input_ids"]
    return both[0], both[1]


def _tokenizer_sample(corpus: Corpus, characters: int = 30_000_000) -> Iterator[str]:
    for name, share in LANGUAGE_MIX.items():
        left = characters * share
        for document in corpus.documents[name]:
            yield document[: int(left)]
            left -= len(document)
            if left <= 0:
                break
