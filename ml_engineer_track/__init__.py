"""The ML engineer's track: the inner loop, from leaflets to a published 4-bit model. Start at `pipeline.py`."""

import logging
import os
import warnings

# Set before the libraries are imported: no telemetry, no bars of their own, no hint about an optional hub download.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# peft asks transformers by a name that is on its way out; nothing a user of this project can do about it.
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
