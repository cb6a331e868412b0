"""Tokens to text as they come: whole characters only, and never a piece of a stop text.

A token may end in the middle of a character, and a stop text may span several tokens; so what could still become either is
held back until the next token decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from ml_engineer_track.serving.engine import Token


@dataclass
class Piece:
    """Text that may be shown now, and the tokens it came with."""

    text: str
    tokens: list[Token] = field(default_factory=list)
    stopped: bool = False


class TextStream:
    """One reply's text. After a piece that is `stopped`, nothing may follow."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self.backend = tokenizer.backend_tokenizer
        self.decoder = DecodeStream(skip_special_tokens=True)
        self.stop = [text for text in stop if text]
        self.held = ""

    def add(self, tokens: Sequence[Token]) -> Piece:
        """The text these tokens complete, up to the first stop text."""
        if not self.stop:
            return Piece("".join(self.decoder.step(self.backend, token.id) or "" for token in tokens), list(tokens))
        taken: list[Token] = []
        shown = ""
        for token in tokens:
            taken.append(token)
            self.held += self.decoder.step(self.backend, token.id) or ""
            found = [place for text in self.stop if (place := self.held.find(text)) >= 0]
            if found:
                return Piece(shown + self.held[: min(found)], taken, stopped=True)
            keep = self._undecided()
            cut = len(self.held) - keep
            shown, self.held = shown + self.held[:cut], self.held[cut:]
        return Piece(shown, taken)

    def rest(self) -> str:
        """What was held back, once the reply is over."""
        held, self.held = self.held, ""
        return held

    def _undecided(self) -> int:
        """Length of the longest end of the text that begins a stop text."""
        return max((n for text in self.stop for n in range(1, len(text)) if self.held.endswith(text[:n])), default=0)
