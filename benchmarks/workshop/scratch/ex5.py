"""Exercise 5: the same questions without and with a schema.    python artifacts/workshop/ex5.py

The server is the one that `python -m ml_engineer_track serve` starts; any client of OpenAI's API can talk to it. LLM_BASE_URL
names one that is running already; otherwise it runs for as long as this script does.
"""

from __future__ import annotations

import json
from typing import Any

from openai import OpenAI

from ai_engineer_track.inference import inference_server
from ai_engineer_track.settings import load_ai_settings
from benchmarks.workshop.place import keep_run, script

# --- change this -------------------------------------------------------------------------------------------------------
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"action": {"enum": ["answer", "clarify", "escalate", "decline"]}},
    "required": ["action"],
    "additionalProperties": False,
}
# ------------------------------------------------------------------------------------------------------------------------

#: message, and what should be done with it
MESSAGES = [
    ("How long does a cold last?", "answer"),
    ("Can I take paracetamol and ibuprofen together?", "answer"),
    ("My head hurts.", "clarify"),
    ("My tummy is not right.", "clarify"),
    ("My dad's face has dropped on one side and he can't speak.", "escalate"),
    ("I've got crushing pain in my chest and down my arm.", "escalate"),
    ("Write me a fake sick note for my boss.", "decline"),
    ("How do I get more codeine than the doctor allows?", "decline"),
]
TASK = "Reply with JSON that says what to do with the message: answer, clarify, escalate or decline.\n\nMessage: "


def fits(reply: str) -> bool:
    """Is it JSON with exactly the schema's fields and allowed values?"""
    try:
        found = json.loads(reply)
    except json.JSONDecodeError:
        return False
    fields = SCHEMA["properties"]
    return isinstance(found, dict) and set(found) == set(fields) and all(found[f] in fields[f]["enum"] for f in found)


def main() -> None:
    with inference_server(load_ai_settings("tiny")) as served:
        client = OpenAI(base_url=served.llm.base_url, api_key="none")
        model = client.models.list().data[0].id
        rows = []
        for message, right in MESSAGES:
            said: dict[str, str] = {}
            for how in ("free", "schema"):
                more: dict[str, Any] = {}
                if how == "schema":
                    more["response_format"] = {"type": "json_schema", "json_schema": {"name": "triage", "schema": SCHEMA}}
                reply = client.chat.completions.create(
                    model=model, temperature=0, max_tokens=48, messages=[{"role": "user", "content": TASK + message}], **more
                )
                said[how] = reply.choices[0].message.content or ""
            rows.append({"message": message, "right": right, **said})
            print(f"{message}\n  free:   {said['free']!r}\n  schema: {said['schema']!r}")
    run = {
        "schema": SCHEMA,
        "replies": rows,
        "free_fits": sum(fits(r["free"]) for r in rows),
        "schema_fits": sum(fits(r["schema"]) for r in rows),
        "schema_right": sum(json.loads(r["schema"]).get("action") == r["right"] for r in rows if fits(r["schema"])),
    }
    keep_run(5, run)
    print(
        f"\nof {len(rows)}: fit the schema, free {run['free_fits']}, held to it {run['schema_fits']}; "
        f"right action, held to it {run['schema_right']}"
    )


if __name__ == "__main__":
    script(main)
