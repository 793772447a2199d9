"""What a model is: its configuration understood, its weights as two-way rules, and Megatron's model built empty.

Only this room names architectures. It reads no file of weights: others ask it which box of which tensor goes where.

* `registry.py`: the families by `model_type`, and `architecture_of`, which opens a configuration
* `architecture.py`: an opened configuration: family, head, layers, and the rules of all weights
* `family.py`: what a family answers, and the checks of keys that families share
* `dense.py`, `llama.py`, `mistral.py`, `qwen.py`, `moe.py`, `gemma.py`, `phi3.py`, `internlm2.py`, `nemotron_nas.py`:
  the families
* `left_out.py`: `block_configs`, blocks that layers lack; `pruned.py`: the forms in which others read such models
* `travelling_code.py`, `modeling_pruned.py`: the Python file that goes with such folders, which is never run here
* `parts.py`: attention, MLP, experts and norms of a layer, with their names and rules
* `heads.py`, `gated_head.py`: what a model ends in
* `rules.py`: one parameter and the boxes of Hugging Face tensors that it is made of; `rope.py`: rotary frequencies
* `stages.py`: which layers and parameters a pipeline stage has; layouts that do not divide a model
* `build.py`: Megatron's model, and the walk that fills or reads it; `dense_logits.py`: whole logits, to compare
"""
