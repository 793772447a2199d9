"""Hugging Face folder <-> Megatron checkpoint, tensor by tensor, without building a model.

* `convert.py`: the plan of an import or export, and its run over a few processes, resumable
* `copying.py`: what each process does: boxes copied block by block, hashed on the way
* `verify.py`: two folders compared, element by element
"""
