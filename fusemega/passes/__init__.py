"""A model run over data: micro-batches, Megatron's schedule, frozen models, forward-only passes.

* `batches.py`: a global batch of samples, cut into this rank's micro-batches
* `forward.py`: Megatron's schedule over a step's micro-batches
* `score.py`: a model over a data set, forward only; `progress.py`: how far it is
* `frozen.py`: a model that is asked and not trained, beside another
* `prefetch.py`: batches built one step ahead
"""
