"""The AI engineer's track: the outer loop, from a published model to a product. Start at `pipeline.py`."""

import logging
import os

# Set before the libraries are imported: no telemetry, and no hint about an optional hub download.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
