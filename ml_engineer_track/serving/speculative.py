"""Speculative decoding: a small model proposes, the large one checks several tokens in one step, and says what it always says.

Why an ML engineer wants it: a decoding step moves all weights through memory, for one token or for five. A student of the
served model (distill.py) guesses most of its tokens; where it guesses wrong the step still yields the right one, so greedy
replies are the same with and without it (Leviathan et al. 2023), only sooner. How much sooner depends on the share accepted.

    python -m ml_engineer_track serve --variant q8_0 --draft student-q8_0

openvino-genai reads the large model from GGUF, but a draft only as a folder in OpenVINO's own format. It can write that format
itself while it loads a GGUF file; `draft_folder` keeps what it wrote below `artifacts/serving`.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ml_engineer_track.decode_speed import Turn, take_turns
from ml_engineer_track.gguf_export import FILE_NAME
from ml_engineer_track.models import check_same_tokenizer
from ml_engineer_track.serving.catalog import Entry, Limits, build, entries
from ml_engineer_track.serving.openvino_engine import DRAFT_TOKENS
from shared.errors import UserError
from shared.files import sha256_file
from shared.metrics import Estimate


@dataclass(frozen=True)
class Speculation:
    """Greedy replies with and without a draft, one request at a time. Throughputs are tokens per second, prompts
    cached; `speed_up` is their ratio over pairs of turns. No grammar, which would decide most tokens by itself."""

    prompts: int
    tokens: int
    same_replies: bool
    draft_tokens: int
    accepted_tokens: int
    acceptance_rate: float
    plain_throughput: float
    draft_throughput: float
    speed_up: Estimate


def with_draft(found: Sequence[Entry], draft: str, artifacts: Path) -> list[Entry]:
    """The entries with a draft model: a folder, or a variant of the version they come from.

    UserError when there is none, another engine serves an entry, or a tokenizer differs.
    """
    made: list[Entry] = []
    for entry in found:
        if entry.engine != "openvino":
            raise UserError(f"--draft works with the CPU engine, not with {entry.engine}", entry.name, "Serve a GGUF variant")
        beside = entry.folder.parent / draft
        source = beside if (beside / "config.json").exists() and "/" not in draft else Path(draft)
        if not source.is_dir():
            known = sorted(p.name for p in entry.folder.parent.iterdir() if (p / "config.json").exists())
            raise UserError(f"no draft model {draft!r}", "--draft", f"A folder, or a variant: {', '.join(known)}")
        readable = source if (source / FILE_NAME).exists() else entries(source, [], "openvino", artifacts)[0].folder
        check_same_tokenizer(str(entry.folder), str(readable), f"--draft {draft}")
        made.append(replace(entry, draft=draft_folder(readable, artifacts)))
    return made


def draft_folder(gguf: Path, artifacts: Path) -> Path:
    """The model of a GGUF folder as openvino-genai wants a draft: converted once, then found by its content."""
    import openvino_genai

    source = gguf / FILE_NAME
    final = artifacts / "serving" / f"{gguf.resolve().name}-{sha256_file(source)[:12]}-draft"
    if (final / "openvino_model.xml").exists():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
    try:
        copy = Path(shutil.copy2(source, aside / FILE_NAME))  # it writes beside what it reads
        openvino_genai.Tokenizer(str(copy), enable_save_ov_model=True)
        small = openvino_genai.SchedulerConfig()
        small.num_kv_blocks = 2
        openvino_genai.ContinuousBatchingPipeline(str(copy), small, "CPU", {"enable_save_ov_model": True})
        copy.unlink()
        for name in ("config.json", "generation_config.json"):
            if (gguf / name).exists():
                shutil.copy2(gguf / name, aside / name)
        for name in ("openvino_model.xml", "openvino_tokenizer.xml"):
            if not (aside / name).exists():
                raise UserError(f"openvino-genai did not write {name}", str(source), "Serve without --draft")
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
    except RuntimeError as error:
        last = str(error).strip().splitlines()[-1][:160]
        raise UserError(f"openvino-genai cannot convert the draft: {last}", str(source), "Serve without --draft") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return final


def measure(
    gguf: Path, draft: Path, prompts: Sequence[list[int]], max_tokens: int, repeats: int, resamples: int, seed: int
) -> Speculation:
    """What `draft` (from `draft_folder`) does for the model in `gguf`: the sides take turns, one prompt at a time.

    Every prompt is read once before it is timed, so that what is timed is decoding. Replies end where they end: past the end a
    model repeats itself, and any draft would look good.
    """
    sides = {"plain": Side(gguf, None), "draft": Side(gguf, draft)}
    replies = {name: [side.reply(prompt, max_tokens)[0] for prompt in prompts] for name, side in sides.items()}
    accepted, proposed = sides["draft"].accepted, sides["draft"].proposed
    tokens = sum(map(len, replies["plain"]))
    turns: dict[str, Turn] = {
        name: lambda n, side=side: side.reply(prompts[n], max_tokens)[1]
        for name, side in sides.items()  # type: ignore[misc]
    }
    found = take_turns(turns, len(prompts), max_tokens, repeats, resamples, seed, "speculative decoding")
    rate = {name: repeats * tokens / sum(times) for name, times in found.seconds.items()}
    return Speculation(
        prompts=len(prompts), tokens=tokens, same_replies=replies["plain"] == replies["draft"], draft_tokens=proposed,
        accepted_tokens=accepted, acceptance_rate=accepted / proposed if proposed else 0.0, plain_throughput=rate["plain"],
        draft_throughput=rate["draft"], speed_up=found.ratio,
    )  # fmt: skip


def decoder(gguf: Path, prompts: Sequence[list[int]], new_tokens: int) -> Turn:
    """The server's engine, decoding exactly `new_tokens` after a prompt that it has read before, whatever it says."""
    side = Side(gguf, None)
    return lambda n: side.reply(prompts[n], new_tokens, to_the_end=True)[1]


class Side:
    """The server's engine, with its settings, asked directly: no queue, no thread, no other request."""

    def __init__(self, gguf: Path, draft: Path | None) -> None:
        self.engine: Any = build(Entry(gguf.name, (), gguf, "openvino", draft=draft), Limits()).engine
        self.engine.do_load()
        self.accepted = self.proposed = 0

    def reply(self, prompt: list[int], max_tokens: int, to_the_end: bool = False) -> tuple[list[int], float]:
        """Token ids and seconds of one greedy reply; `to_the_end` of max_tokens, whatever stands before."""
        import openvino

        config = self.engine.settings(max_tokens, logprobs=False)
        if to_the_end:
            config.ignore_eos, config.stop_token_ids = True, set()
        if self.engine.draft is not None:
            config.num_assistant_tokens = DRAFT_TOKENS
        started = time.perf_counter()
        result = self.engine.pipeline.generate([openvino.Tensor(np.array([prompt], dtype=np.int64))], [config])[0]
        seconds = time.perf_counter() - started
        if self.engine.draft is not None:
            self.accepted += result.extended_perf_metrics.get_num_accepted_tokens()
            self.proposed += result.extended_perf_metrics.get_num_draft_tokens()
        return list(result.m_generation_ids[0]), seconds
