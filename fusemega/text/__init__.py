"""From rows of chat or text to token sequences that know which tokens are targets.

data.py       files and datasets -> rows
document.py   rows -> conversations or texts, with the reasons for refusing one
tokenizer.py  a HF fast tokenizer, its hashes, its offsets
templates.py  a chat template, rendered within a budget (by template_process.py, in a process of its own)
chat.py       a conversation -> rendered text and the spans of its contents
sample.py     one tokenization + spans -> windows of tokens, their keys and coordinates
dataset.py    all samples of a data set, tokenized once, memory-mapped
order.py      which samples make up step n
packing.py    a global batch -> the rows of every rank's micro-batches
"""
