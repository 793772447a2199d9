"""Hugging Face folders: opens and checks them, reads them into models, writes them, and more.

* `folder.py`: a folder's configuration, tensors and files, by name; `check.py`: that a family can take it
* `load.py`, `export.py`: a model filled from a folder, and written as one
* `new_score.py`: a language model's folder with a new scalar head
* `safetensors_writer.py`, `ranges.py`: safetensors files written in shards, and read and written by ranges
* `side_files.py`: tokenizer, templates and the like, which travel with weights; `loadable.py`: that users can load it
* `proof.py`: hashes of a folder that we wrote; `narrowing.py`: when a narrower type is refused; `rounding.py`:
  when 16 bits leave too little of an update
* `adapter.py`, `cut_layers.py`, `hub.py`: LoRA merged into its base; layers left out; names of the hub
"""
