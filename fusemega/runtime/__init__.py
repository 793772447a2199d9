"""The machine: devices, process groups, Megatron-core's layers and faults, processes. Only this room knows of GPUs.

Who and where
    layout.py             `parallel:` of a run file; parallel.py: process groups, and which rank this is
    device.py             which device; precision.py: whose layers, and FP8; kernel_packages.py: the GPU packages
    environment.py        what this machine has, for `fusemega env`; memory.py: how much was needed
    readings.py           what a device reports; nvml.py: a GPU's readings and faults
    forward_clock.py      how long this rank's forward passes take
Layers
    specs.py              layer specs; local_layers.py: their modules; cpu_ops.py: norms and gated units on a CPU
    experts.py            layers of experts
    rope.py               rotary positions of packed rows; text_rope.py: what they have besides frequencies
    capped_attention.py   attention with capped scores; te_norm.py: a norm after Transformer Engine's last product
    segments.py           the segments of a packed row; context_parallel.py: rows split over ranks
    shared_prompts.py     attention of rows with shared prompts on a GPU; te_attention.py: beside Transformer Engine's
    fused_adam.py         Adam where no GPU package brings one; gradient_norm.py: norm and clipping there
    random_state.py       all random generators
Megatron-core
    cpu_backend.py        Megatron-core without CUDA; without_compiling.py: a faster start there
    megatron_fixes.py     its faults on any machine
Processes
    console.py            what a run says; signals.py: how it is stopped; meter.py: how far a conversion is
    activity.py           what this process is doing, for those who watch it
    workers.py            a few processes that share a list of work; lifeline.py: none outlives its parent
    meeting.py            where ranks and launcher meet; together.py: files that all ranks write as one
"""
