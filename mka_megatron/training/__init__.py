"""Training: engine, loop, checkpoints, and what they report.

DeepSpeed decides on its accelerator when it is first imported and guesses aloud when nothing is set;
this package is imported before it on every path, so this is the one place that decides.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
