"""Megatron's distributed checkpoints: those of training runs, and imported models.

open_model.py         `model:` of a run file, opened, checked, and later filled
megatron_folder.py    the folders: an imported model, a run's checkpoint
series.py             the checkpoints of a run: which are whole, which is the newest, which may go
loading.py            one that does not load: the run goes on from the one before it, once
saver.py              writes them, at once or in the background
training_state.py     what one holds: model, optimizer, random state
torch_dist.py         Megatron's format, through Megatron
torch_dist_files.py   the same files without building a model
index_file.py         their index, which is a pickle
read_plan.py          what each rank of a layout would read
"""
