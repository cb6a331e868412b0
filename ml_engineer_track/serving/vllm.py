"""vLLM on the same artifact, with the same golden-output check, where it is installed (an environment of its own: it pins torch).

    python -m venv .venv-vllm && .venv-vllm/bin/pip install vllm
    PATH=$PWD/.venv-vllm/bin:$PATH python -m ml_engineer_track serve --engine vllm --variant bf16

Our part is small: start `vllm serve` on the variant's folder, replay the golden prompts as token ids over its API, and stop it
when the replies differ. It answers on the port before they are compared; /health of vLLM is not our /ready.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
from transformers import PreTrainedTokenizerBase

from ml_engineer_track.models import load_tokenizer, prompt_text
from ml_engineer_track.serving.adapters import Adapter, base_of
from ml_engineer_track.serving.catalog import stop_ids
from ml_engineer_track.serving.parity import differs, first_difference
from ml_engineer_track.serving.serve import listen
from shared import handoff
from shared.errors import UserError
from shared.handoff import Golden

START_SECONDS = 600.0
#: The values `--max-lora-rank` takes; its default of 16 would refuse larger adapters.
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def serve_with_vllm(
    model: Path | None, variants: Sequence[str], adapters: Sequence[Adapter], host: str, port: int, artifacts: Path
) -> None:
    """Run vLLM until it ends. UserError when it is not installed, stops early, or answers other than the golden replies."""
    program = shutil.which("vllm")
    if program is None:
        raise UserError("vllm is not installed", "PATH", "Install it in an environment of its own; serving/vllm.py says how")
    golden: Sequence[Golden] = ()
    if adapters:
        weights = base_of(adapters, model, variants, "vllm")
        names = [weights.resolve().name]
    else:
        folder = model or handoff.current(artifacts / "models")
        manifest = handoff.verify(folder)
        variant = variants[0] if variants else "bf16"
        if len(variants) > 1 or variant not in manifest.variants:
            raise UserError("vllm serves one variant", str(folder), f"Give one of: {', '.join(manifest.variants)}")
        weights, names = folder / variant, [f"{manifest.model_id}:{variant}", variant]
        golden = manifest.variants[variant].golden
    listen(host, port).close()  # a port in use would look like a vLLM that is ready
    process = subprocess.Popen([program, *arguments(weights, names, adapters, host, port)])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # or it would go on without us; it drains when told to stop
    try:
        url = f"http://{host}:{port}"
        _wait(process, url)
        tokenizer = load_tokenizer(str(weights))
        check(url, names[0], tokenizer, stop_ids(weights, tokenizer), golden)
        print("ready", flush=True)
        process.wait()
    finally:
        process.terminate()
        process.wait()


def arguments(weights: Path, names: Sequence[str], adapters: Sequence[Adapter], host: str, port: int) -> list[str]:
    """What follows `vllm` on the command line."""
    words = ["serve", str(weights), "--host", host, "--port", str(port), "--served-model-name", *names]
    if adapters:
        rank = max(adapter.rank for adapter in adapters)
        room = next((allowed for allowed in LORA_RANKS if allowed >= rank), rank)
        words += ["--enable-lora", "--max-lora-rank", str(room), "--lora-modules", *(f"{a.name}={a.folder}" for a in adapters)]
    return words


def check(url: str, name: str, tokenizer: PreTrainedTokenizerBase, stops: Sequence[int], golden: Sequence[Golden]) -> None:
    """UserError naming the first golden prompt that is answered otherwise, and the first differing token.

    `stops` end a reply and are not compared: engines differ in whether they tell them. vLLM before 0.10.2 does not tell tokens
    (`return_token_ids`); its texts are made tokens again.
    """
    for number, wanted in enumerate(golden, start=1):
        ids = tokenizer(prompt_text(tokenizer, wanted.messages), add_special_tokens=False)["input_ids"]
        body = {
            "model": name, "prompt": ids, "max_tokens": wanted.max_tokens, "temperature": 0, "return_token_ids": True,
        }  # fmt: skip
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
        answer.raise_for_status()
        choice = answer.json()["choices"][0]
        told, expected = choice.get("token_ids"), [i for i in wanted.token_ids if i not in stops]
        if told is None and choice["text"] == wanted.reply:
            continue
        if told is None:
            told = tokenizer(choice["text"], add_special_tokens=False)["input_ids"]
        if difference := first_difference(expected, [i for i in told if i not in stops]):
            raise differs(tokenizer, number, len(golden), wanted, difference, f"model {name}", "Do not serve it with this engine")


def _wait(process: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise UserError("vllm stopped at its start", "vllm serve", "Its own messages above say why")
        try:
            if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(1)
    raise UserError(f"vllm was not ready after {START_SECONDS:.0f} s", url, "Its own messages above say why")
