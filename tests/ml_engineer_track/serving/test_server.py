"""The real server over the bundled model, driven by the official client: the contract, and the faults a process can have."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from transformers import PreTrainedTokenizerBase

from ml_engineer_track.models import prompt_text
from ml_engineer_track.serving.serve import listen
from shared import handoff
from shared.chat import ACTIONS, NOT_ANSWERED, Decision, Source, Verdict, answer_messages, grounded_grammar, parse_answer, quote
from shared.errors import UserError
from shared.files import write_text
from tests.ml_engineer_track.serving.conftest import (
    DECIDE,
    QUESTION,
    SOURCES,
    address_of,
    run_serve,
    stop,
    wait_ready,
)

GREEDY: dict[str, Any] = {"model": "q8_0", "messages": DECIDE, "temperature": 0, "max_tokens": 40}


def content(answer: Any) -> str:
    return str(answer.choices[0].message.content)


def structured(client: openai.OpenAI, messages: Any = DECIDE, model: str = "q8_0", **constraint: Any) -> str:
    body = {"structured_outputs": constraint}
    return content(client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=200, extra_body=body))


def test_both_variants_are_listed_under_names_that_work(client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert names == ["tiny-bundled:q8_0", "tiny-bundled:q4_0", "all-minilm-l6-v2"]
    for name in names[:2]:
        assert client.chat.completions.create(**{**GREEDY, "model": name}).model == name


def test_the_server_says_what_was_published(client: openai.OpenAI, artifact: Path) -> None:
    for name, variant in handoff.read_manifest(artifact).variants.items():
        if name != "bf16":
            for golden in variant.golden:
                options = {"messages": golden.messages, "max_tokens": golden.max_tokens, "model": name}
                assert content(client.chat.completions.create(**{**GREEDY, **options})) == golden.reply


def test_a_stream_is_the_reply_in_pieces_with_the_usage_at_its_end(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**GREEDY)
    chunks = list(client.chat.completions.create(**GREEDY, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == content(whole)
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(c.usage is None for c in chunks[:-1])
    assert len({c.id for c in chunks}) == 1


def test_a_stream_ends_with_done(address: str) -> None:
    with httpx.stream("POST", f"{address}/v1/chat/completions", json={**GREEDY, "stream": True}, timeout=60) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert all(line.startswith("data: {") for line in lines[:-1])


def test_usage_counts_the_tokens_of_the_prompt_as_it_was_laid_out(
    client: openai.OpenAI, base_tokenizer: PreTrainedTokenizerBase
) -> None:
    usage = client.chat.completions.create(**GREEDY).usage
    assert usage
    assert usage.prompt_tokens == len(base_tokenizer(prompt_text(base_tokenizer, DECIDE), add_special_tokens=False)["input_ids"])
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_max_tokens_and_stop_end_a_reply(client: openai.OpenAI) -> None:
    full = content(client.chat.completions.create(**GREEDY))
    cut = client.chat.completions.create(**{**GREEDY, "max_tokens": 3})
    assert (cut.choices[0].finish_reason, cut.usage.completion_tokens) == ("length", 3)  # type: ignore[union-attr]
    stopped = client.chat.completions.create(**GREEDY, stop=[full[4:7], "never"])
    assert content(stopped) == full[: full.index(full[4:7])]
    assert stopped.choices[0].finish_reason == "stop"


def test_n_choices_differ_and_a_seed_repeats_them(client: openai.OpenAI) -> None:
    def ask(seed: int, n: int) -> list[str]:
        options = {**GREEDY, "temperature": 1.5, "max_tokens": 24}
        answers = client.chat.completions.create(**options, n=n, seed=seed).choices
        assert [choice.index for choice in answers] == list(range(n))
        return [str(choice.message.content) for choice in answers]

    assert ask(1, 1) == ask(1, 1)
    assert len(set(ask(3, 6))) > 1
    assert len({*ask(1, 1), *ask(2, 1), *ask(3, 1), *ask(4, 1)}) > 1


def test_plain_completions_take_texts_and_token_ids(client: openai.OpenAI, base_tokenizer: PreTrainedTokenizerBase) -> None:
    ids = base_tokenizer("The heart is", add_special_tokens=False)["input_ids"]
    options: dict[str, Any] = {"model": "q8_0", "temperature": 0, "max_tokens": 6}
    one = client.completions.create(**options, prompt="The heart is").choices[0].text
    assert client.completions.create(**options, prompt=ids).choices[0].text == one
    several = client.completions.create(**options, prompt=["The heart is", "A kidney"]).choices
    assert [choice.index for choice in several] == [0, 1]
    assert several[0].text == one
    told = client.completions.create(**options, prompt="The heart is", logprobs=1).choices[0].logprobs
    assert told
    assert "".join(told.tokens or []) == one
    streamed = client.completions.create(**options, prompt="The heart is", stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == one


# --- constraints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["q8_0", "q4_0"])
def test_a_choice_is_one_of_them(client: openai.OpenAI, model: str) -> None:
    assert structured(client, model=model, choice=list(ACTIONS)) in ACTIONS


def test_json_follows_its_schema_in_compact_form(client: openai.OpenAI) -> None:
    reply = structured(client, json=Verdict.model_json_schema())
    assert json.dumps(Verdict.model_validate_json(reply).model_dump(), separators=(",", ":")) == reply
    schema = {"type": "json_schema", "json_schema": {"name": "decision", "schema": Decision.model_json_schema()}}
    assert Decision.model_validate_json(content(client.chat.completions.create(**GREEDY, response_format=schema)))


def test_json_objects_and_small_top_p(client: openai.OpenAI) -> None:
    """`json_object` may run out of tokens before its end, never leave JSON; of a tiny top_p only the likeliest token is left."""
    answer = client.chat.completions.create(**{**GREEDY, "max_tokens": 400}, response_format={"type": "json_object"})
    assert content(answer).startswith("{")
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(content(answer)), dict)
    likeliest = client.chat.completions.create(**{**GREEDY, "temperature": 1.5, "top_p": 1e-6})
    assert content(likeliest) == content(client.chat.completions.create(**GREEDY))


def test_json_with_free_texts_and_numbers_parses(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"note": {"type": "string", "maxLength": 12}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["note", "n"],
    }
    value = json.loads(structured(client, json=schema))
    assert list(value) == ["note", "n"]
    assert len(value["note"]) <= 12


def test_regex_and_ebnf_hold(client: openai.OpenAI) -> None:
    reply = structured(client, regex=r"[a-c]{3}-\d{2}")
    assert reply[3] == "-"
    assert set(reply[:3]) <= set("abc")
    assert reply[4:].isdecimal()
    assert structured(client, grammar='root ::= "[" [x-z] ("," [x-z]){2} "]"')[0::2] in ("[,,]", "[,,")


def test_grounded_replies_quote_the_sources_streamed_too(client: openai.OpenAI) -> None:
    body = {"structured_outputs": {"grammar": grounded_grammar(SOURCES)}}
    options: dict[str, Any] = {"model": "q8_0", "messages": QUESTION, "temperature": 0, "extra_body": body}
    reply = content(client.chat.completions.create(**options))
    assert reply == NOT_ANSWERED or all(quote(q.number or 0, q.text) == quote(q.number or 0, SOURCES[(q.number or 0) - 1].text)
                                        for q in parse_answer(reply))  # fmt: skip
    streamed = client.chat.completions.create(**options, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == reply


def test_grounded_over_sixty_sentences(client: openai.OpenAI) -> None:
    sources = [Source(id=str(n), heading="Rest", text=f'Advice {n}: rest – "properly" – for {n} days.') for n in range(60)]
    messages, body = answer_messages("How long should I rest?", sources), {"grammar": grounded_grammar(sources)}
    reply = structured(client, messages, **body)
    options: dict[str, Any] = {**GREEDY, "messages": messages, "max_tokens": 200, "extra_body": {"structured_outputs": body}}
    streamed = client.chat.completions.create(**options, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == reply
    texts = [quote(n, source.text) for n, source in enumerate(sources, start=1)]
    assert reply == NOT_ANSWERED or all(quote(q.number or 0, q.text) in texts for q in parse_answer(reply))


def test_logprobs_are_the_models_own_and_choices_list_their_alternatives(client: openai.OpenAI) -> None:
    body = {"structured_outputs": {"choice": list(ACTIONS)}}
    answer = client.chat.completions.create(**GREEDY, logprobs=True, top_logprobs=8, extra_body=body)
    told = answer.choices[0].logprobs.content  # type: ignore[union-attr]
    assert content(answer) in ACTIONS
    assert told
    first = {top.token: top.logprob for top in told[0].top_logprobs}
    assert all(any(action.startswith(token) for action in ACTIONS) for token in first)
    assert len(first) == 4  # the four actions begin with four different tokens
    assert told[0].logprob == max(first.values())
    assert sum(map(math.exp, first.values())) <= 1 + 1e-3
    free = client.chat.completions.create(**GREEDY, logprobs=True).choices[0].logprobs
    assert free
    assert all(-30 < entry.logprob <= 0 for entry in free.content or [])


def test_requests_with_different_constraints_share_a_batch(address: str) -> None:
    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:

            async def ask(n: int) -> str:
                kinds: list[dict[str, Any]] = [
                    {"choice": ["red", "green"]},
                    {"regex": r"\d{4}"},
                    {"json": Decision.model_json_schema()},
                ]
                body = {"structured_outputs": kinds[n % 4]} if n % 4 < 3 else {}
                return content(await client.chat.completions.create(**GREEDY, extra_body=body))

            return await asyncio.gather(*(ask(n) for n in range(16)))

    for n, reply in enumerate(asyncio.run(run())):
        if n % 4 == 0:
            assert reply in ("red", "green")
        elif n % 4 == 1:
            assert len(reply) == 4
            assert reply.isdecimal()
        elif n % 4 == 2:
            assert Decision.model_validate_json(reply)


# --- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"model": "gpt-9"}, "there is: tiny-bundled:q8_0, tiny-bundled:q4_0"),
        ({"max_tokens": 5000}, "at most 2048 tokens"),
        ({"messages": [{"role": "user", "content": "fever " * 3000}]}, "at most 2048 tokens; the prompt has"),
        ({"extra_body": {"structured_outputs": {"grammar": "start: nothing"}}}, "'nothing' is used but not defined"),
    ],
)
def test_what_cannot_be_answered_is_a_bad_request(client: openai.OpenAI, change: dict[str, Any], why: str) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        client.chat.completions.create(**{**GREEDY, **change})
    assert why in str(refusal.value)


def gauge(address: str, name: str) -> float:
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"{name}{{"))


def test_a_client_that_leaves_frees_its_slot(address: str, client: openai.OpenAI) -> None:
    endless = {**GREEDY, "max_tokens": 1900, "extra_body": {"ignore_eos": True}}
    with client.chat.completions.create(**endless, stream=True) as stream:
        for _, _chunk in zip(range(3), stream, strict=False):
            pass
        assert gauge(address, "num_requests_running") == 1
    deadline = time.monotonic() + 20
    while gauge(address, "num_requests_running"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert gauge(address, "kv_cache_usage_perc") == 0
    assert content(client.chat.completions.create(**GREEDY))


@pytest.mark.slow
def test_sigterm_while_it_loads_ends_it_and_its_engine(artifact: Path) -> None:
    process = run_serve("--model", str(artifact), "--variant", "q4_0")
    try:
        address_of(process)
        found = psutil.Process(process.pid)
        deadline = time.monotonic() + 120
        while not found.children() and time.monotonic() < deadline:
            time.sleep(0.05)
        children = found.children(recursive=True)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)
        assert psutil.wait_procs(children, timeout=20)[1] == []
    finally:
        stop(process)


@pytest.mark.slow
def test_an_engine_that_crashes_fails_its_batch_and_the_next_request_finds_a_new_one(artifact: Path) -> None:
    process = run_serve("--model", str(artifact), "--variant", "q4_0")
    try:
        address = address_of(process)
        wait_ready(process, address)
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        before = content(client.chat.completions.create(**{**GREEDY, "model": "q4_0"}))
        endless = {**GREEDY, "model": "q4_0", "max_tokens": 1900, "extra_body": {"ignore_eos": True}}
        stream = client.chat.completions.create(**endless, stream=True)
        next(stream)
        for child in psutil.Process(process.pid).children(recursive=True):
            if "spawn_main" in " ".join(child.cmdline()):
                child.kill()
        with pytest.raises(openai.APIError, match="its process ended"):
            list(stream)
        assert content(client.chat.completions.create(**{**GREEDY, "model": "q4_0"})) == before
    finally:
        stop(process)


def test_embeddings_are_sentence_vectors(address: str, client: openai.OpenAI) -> None:
    found = client.embeddings.create(model="all-minilm-l6-v2", input=["a sore throat", "it hurts to swallow", "the price of tea"])
    vectors = [entry.embedding for entry in found.data]
    assert {len(vector) for vector in vectors} == {384}

    def cosine(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True))

    assert cosine(vectors[0], vectors[0]) == pytest.approx(1, abs=1e-4)
    assert cosine(vectors[0], vectors[1]) > cosine(vectors[0], vectors[2])
    assert found.usage.prompt_tokens > 6
    body = {"model": "all-minilm-l6-v2", "input": "a sore throat", "encoding_format": "base64"}
    first = httpx.post(f"{address}/v1/embeddings", json=body, timeout=60).json()["data"][0]["embedding"]
    assert struct.unpack("<384f", base64.b64decode(first))[0] == pytest.approx(vectors[0][0], abs=1e-5)


def test_a_port_in_use_is_said_in_one_line(address: str) -> None:
    port = int(address.rsplit(":", 1)[1])
    with pytest.raises(UserError) as refusal:
        listen("127.0.0.1", port)
    assert str(refusal.value) == f"port {port} of 127.0.0.1 is in use. Choose another with --port"
    with pytest.raises(UserError, match="port 99999 does not exist"):
        listen("127.0.0.1", 99999)


def test_a_variant_that_answers_otherwise_never_becomes_ready(artifact: Path, tmp_path: Path) -> None:
    """The weights of one variant under the golden replies of another model: what a broken conversion looks like."""
    folder = Path(shutil.copytree(artifact, tmp_path / "version"))
    manifest = handoff.read_manifest(folder)
    manifest.variants["q4_0"].golden[1].token_ids[2] += 1
    write_text(folder / "manifest.json", manifest.model_dump_json())
    handoff.write_sums(folder)
    process = run_serve("--model", str(folder), "--variant", "q4_0")
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 2
    assert "ready\n" not in output
    last = errors.strip().splitlines()[-1]
    assert last.startswith("error: golden prompt 2 of 2 ('Message: I have had a headache since Monday.')")
    assert "from token 3 on" in last
    assert "variant tiny-bundled:q4_0" in last


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--variant", "q2"], "no variant 'q2'"),
        (["--variant", "bf16", "--engine", "openvino"], "engine openvino cannot serve this variant"),
        (["--engine", "magic"], "unknown engine 'magic'"),
        (["--engine", "vllm"], "vllm is not installed"),
        (["--host", "192.0.2.1"], "cannot be taken"),
    ],
)
@pytest.mark.slow
def test_what_cannot_be_served_is_said_in_one_line(artifact: Path, options: list[str], told: str) -> None:
    process = run_serve("--model", str(artifact), *options)
    _, errors = process.communicate(timeout=280)
    assert process.returncode == 2
    assert told in errors
    assert errors.count("\n") == 1


@pytest.mark.slow
def test_sigterm_lets_running_replies_finish(artifact: Path) -> None:
    process = run_serve("--model", str(artifact), "--variant", "q4_0")
    try:
        address = address_of(process)
        wait_ready(process, address)
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        options = {**GREEDY, "model": "q4_0", "max_tokens": 150, "extra_body": {"ignore_eos": True}}
        stream = client.chat.completions.create(**options, stream=True)
        chunks = [next(stream), next(stream)]
        process.send_signal(signal.SIGTERM)
        chunks += list(stream)
        assert chunks[-1].choices[0].finish_reason == "length"
        process.wait(timeout=30)
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", int(address.rsplit(":", 1)[1])))
    finally:
        stop(process)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_request_the_schema_allows_breaks_the_server(address: str, tmp_path: Path) -> None:
    """Fuzzed from its own schema, narrowed to the models that are there and to short replies: else nothing gets past the name."""
    document = httpx.get(f"{address}/openapi.json").json()
    for name, model in (("ChatRequest", "q4_0"), ("CompletionRequest", "q4_0"), ("EmbeddingRequest", "all-minilm-l6-v2")):
        schema = document["components"]["schemas"][name]
        schema["properties"]["model"] = {"enum": [model]}
        if name != "EmbeddingRequest":
            schema["properties"]["max_tokens"] = {"type": "integer", "minimum": 1, "maximum": 8}
            schema["properties"].pop("max_completion_tokens", None)
            schema["required"].append("max_tokens")
    write_text(tmp_path / "openapi.json", json.dumps(document))
    done = subprocess.run(
        [str(Path(sys.executable).parent / "schemathesis"), "run", str(tmp_path / "openapi.json"), "--url", address,
         "--checks", "not_a_server_error", "--max-examples", "80", "--seed", "7", "--exclude-path", "/ready", "--no-color"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    counted = httpx.get(f"{address}/metrics").text
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings"):
        assert f'http_requests_total{{path="{path}",status="200"}}' in counted
    assert 'engine_failures_total{model="tiny-bundled:q4_0"} 0.0' in counted
    assert httpx.get(f"{address}/ready").status_code == 200
