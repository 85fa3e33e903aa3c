"""The learning rate as a pure function of the step: linear warm-up, then cosine, constant or WSD."""

from __future__ import annotations

import math

from mka_megatron.config.schema import TrainingConfig


def learning_rate(step: int, training: TrainingConfig) -> float:
    """Learning rate of the optimizer step with index `step` (0 is the run's first).

    The peak is reached by the last warm-up step (index `warmup_steps - 1`). `cosine` falls from there
    to `min_learning_rate` at the run's last step; `wsd` stays at the peak and falls linearly over the
    last `decay_steps` steps; `constant` stays. Steps after the last keep the last value.
    """
    peak, floor = training.learning_rate, training.min_learning_rate
    done = step + 1
    if done <= training.warmup_steps:
        return peak * (done / training.warmup_steps)
    if training.schedule == "constant":
        return peak
    if training.schedule == "wsd":
        fall = max(1, min(training.decay_steps, training.steps - training.warmup_steps))
        progress = (done - (training.steps - fall)) / fall
        return peak - (peak - floor) * min(1.0, max(0.0, progress))
    progress = min(1.0, (done - training.warmup_steps) / max(1, training.steps - training.warmup_steps))
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
