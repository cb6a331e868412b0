"""The inference server: one HTTP API (OpenAI's) over the engine that fits the machine. `serve.py` starts it."""
