"""Training: engine, loop, checkpoints, and what they report.

DeepSpeed reads two things from the environment: its accelerator, on which it decides when it is first
imported (and guesses aloud when nothing is set), and LOCAL_RANK, without which it does not start. This
package is imported before DeepSpeed on every path, so this is the one place that sets them.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("LOCAL_RANK", "0")
