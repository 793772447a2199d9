"""The check for one GPU: what is right, what is wrong and how fast it is, in ten minutes. `check.py` is the command.

The frame
    check.py              the command; registry.py: the parts, their limits and needs
    runner.py             each part in a process of its own, watched and ended; worker.py: that process
    report.py             the rows that a part writes; table.py: all of them for a reader, and as JSON
    job.py                what a part is told; card.py: the device, its clock, memory and peak rate
    elsewhere.py          the same work on the CPU beside it
    models.py             text, tokenizer and models from a seed, so that most parts need no download
    trained.py            run files and training steps of the parts
The parts
    environment.py        packages, driver, and the rates that the card reaches
    exact_head.py         the vocabulary head against float64; packed_attention.py: packed rows against float64
    objectives.py         training steps on the card against the CPU's
    resume.py             checkpoints of the card resumed there and on the CPU, and back
    head_cost.py          the head's time and memory beside dense torch and Liger
    speed.py              whole training steps beside transformers, with step_cost.py: profile and synchronisations
    shared_prompts.py     preference pairs with each prompt once in a row, and twice
    real_fusion.py        `control` and `fused` on SmolLM2's weights
    fp8.py                Transformer Engine and FP8 beside bf16
"""
