"""Which model does what: decisions and phrasing go to the small one, answers to the large one where there is one.

Why an AI engineer routes: most calls of an assistant are small decisions, and a large model for all of them multiplies cost and
waiting for no gain. A quotation from clearly matching sentences needs no large model either, so only answers that retrieval is
unsure of go there. Either model stands in when the other cannot be reached.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from ai_engineer_track.llm import Llm, LlmUnavailable, Reply
from shared import chat

Task = Literal["decide", "phrase", "answer"]
SURE = 0.9  # confidence that the sources answer, above which the small model quotes


class Router:
    """`large` None: one model does everything."""

    def __init__(self, small: Llm, large: Llm | None = None) -> None:
        self.small, self.large = small, large

    def order(self, task: Task, confidence: float = 1.0) -> list[Llm]:
        """The models to try, the first choice first."""
        if self.large is None:
            return [self.small]
        if task == "answer" and confidence < SURE:
            return [self.large, self.small]
        return [self.small, self.large]

    async def chat(
        self,
        task: Task,
        messages: Sequence[chat.Message],
        *,
        max_tokens: int,
        structured: dict[str, Any] | None = None,
        on_text: Callable[[str], None] | None = None,
        confidence: float = 1.0,
    ) -> Reply:
        """The reply of the first model that can be reached. LlmUnavailable when none can; LlmNonsense as it comes."""
        models = self.order(task, confidence)
        for model in models[:-1]:
            try:
                return await model.chat(messages, max_tokens=max_tokens, structured=structured, on_text=on_text)
            except LlmUnavailable:
                continue
        return await models[-1].chat(messages, max_tokens=max_tokens, structured=structured, on_text=on_text)
