"""Training: from a run file to trained weights, with metrics, held-out text, checkpoints and exact resume.

The room knows no single method: an objective brings its loss, and what happens around a step is in callbacks.

    run_file.py     the typed run file of `fusemega train`
    assembly.py     `fusemega train`: what a run names, opened, checked and put together; what a finished run leaves
    dry_run.py      `fusemega train --dry-run`: what a run would do
    trainer.py      the step and the loop
    balancing.py    the loss that balances experts
    callbacks.py    the interface of callbacks
    checkpoints.py  callback: when a checkpoint is written, and how a run resumes
    held_out.py     callback: held-out text, the best checkpoint, patience
    reference_check.py  is the model that training starts from the reference of its loss?
    metrics.py      callbacks: what a step cost; where the numbers go
    monitor.py      callback: readings of devices, slow ranks, spikes
    profile.py      callback: traces of a few iterations, and what their operations cost
    profile_table.py  that cost, as a report reads it, without torch
    wandb_run.py    Weights & Biases, where a run asks for it
    identity.py     what a run is made from, by content
    optimizer.py    Megatron's data-parallel wrapper, optimizer and learning-rate schedule
    export.py       `output_dir/hf`: the weights that a run ends with
    records.py      the files a run leaves for others to read, without torch
"""
