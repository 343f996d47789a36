"""Few-shot tasks, sampled in batches on the device that trains on them."""

from maml_fast.tasks.sinusoid import Episodes, SinusoidTasks, Waves

__all__ = ["Episodes", "SinusoidTasks", "Waves"]
