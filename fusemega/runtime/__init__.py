"""The machine: the CPU backend of Megatron-core, process groups, precision, random state, launching, logging."""
