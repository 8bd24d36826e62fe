"""Learning rate as a pure function of the step; nothing to save, nothing to restore. No torch."""

import math

from bigbatch.recipes.core.config import ScheduleSection


def learning_rate_factor(schedule: ScheduleSection, step: int) -> float:
    """Return the factor on the peak learning rate for optimizer step `step` (0 is the first).

    Warm-up is linear and reaches the peak at step `warmup_steps`; the decay ends at `final_ratio` with the last step.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / (schedule.warmup_steps + 1)
    span = max(1, schedule.total_steps - 1 - schedule.warmup_steps)
    progress = min(1.0, (step - schedule.warmup_steps) / span)
    if schedule.name == "wsd":
        return _wsd(schedule, step)
    return schedule.final_ratio + (1 - schedule.final_ratio) * _decay(schedule, progress)


def _decay(schedule: ScheduleSection, progress: float) -> float:
    """Fall from 1 to 0 as progress goes from 0 to 1."""
    if schedule.name == "cosine":  # Loshchilov & Hutter 2017, equation 5, one period
        return 0.5 * (1 + math.cos(math.pi * progress))
    if schedule.name == "constant":
        return 1.0
    return (1 - progress) ** (schedule.power if schedule.name == "polynomial" else 1.0)


def _wsd(schedule: ScheduleSection, step: int) -> float:
    """Warm up, stay, decay linearly (Hu et al. 2024, MiniCPM, section 4)."""
    after_peak = schedule.total_steps - 1 - schedule.warmup_steps
    decay_steps = schedule.decay_steps or max(1, min(schedule.total_steps // 10, after_peak))
    decay_begin = schedule.total_steps - decay_steps
    if step < decay_begin:
        return 1.0
    progress = min(1.0, (step + 1 - decay_begin) / decay_steps)
    return schedule.final_ratio + (1 - schedule.final_ratio) * (1 - progress)
