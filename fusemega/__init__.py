"""fusemega: turn several trained language models into one better, or smaller, model, on Megatron-core."""

__version__ = "0.1.0"
