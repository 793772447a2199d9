"""Training: from a run file to trained weights, with metrics, held-out text, checkpoints and exact resume.

The room knows no single method: an objective brings its loss, and what hangs on a step is a callback.

    run_file     the typed run file of `fusemega train`
    assembly     `fusemega train`: everything a run names opened, checked and put together; what a finished run leaves
    dry_run      `fusemega train --dry-run`: what a run would do
    trainer      the step and the loop
    callbacks    what may hang on a step
    checkpoints  callback: when a checkpoint is written, and how a run resumes
    held_out     callback: held-out text, the best checkpoint, patience
    metrics      callbacks: what a step cost; where the numbers go
    profile      callback: traces of a few iterations, and what their operations cost
    profile_table  that cost, as a report reads it, without torch
    wandb_run    Weights & Biases, where a run asks for it
    identity     what a run is made from, by content
    optimizer    Megatron's data-parallel wrapper, optimizer and learning-rate schedule
    export       `output_dir/hf`: the weights that a run ends with
    records      the files a run leaves for others to read, without torch
"""
