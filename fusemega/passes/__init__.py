"""A model run over data: micro-batches, Megatron's schedule, frozen models, forward-only passes.

* `micro_batch.py`: one packed row with what belongs to its positions, sequences and groups
* `batches.py`: a global batch of samples, cut into this rank's micro-batches
* `prefetch.py`: batches built one step ahead
* `forward.py`: Megatron's schedule over a step's micro-batches
* `answers.py`: a model's answer for a micro-batch; `rewards.py`: a reward model's scores of its texts
* `frozen.py`: models that are only asked, beside the one in training
* `layers.py`: hidden states inside a model, handed out while a pass runs
* `score.py`: a model over a data set, forward only; `progress.py`: how far it is
"""
