"""Training: run files, data in order, Megatron's schedules and optimizers, metrics, exact resume."""
