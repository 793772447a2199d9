"""From rows of chat or text to token sequences that know which tokens are targets.

data.py       files and datasets -> rows
document.py   rows -> conversations, texts or groups, with the reasons for refusing one
conversation.py  messages -> a conversation; groups.py: several responses to one prompt
fields.py     what a row and a message may hold besides
split.py      long documents cut so that they fit several tokenizers' windows
tokenizer.py  a HF fast tokenizer, its hashes, its offsets
vocabulary_files.py  what a model folder's files say of its vocabulary
templates.py  a chat template, rendered within a budget (by template_process.py, in a process of its own)
chat.py       a conversation -> rendered text; spans.py: where its contents lie in it
sample.py     one tokenization + spans -> windows of tokens, their keys and coordinates
truncation.py  the part of a group's samples that fits in a row
dataset.py    all samples of a data set, tokenized once, memory-mapped; row_progress.py: rows done, shown
order.py      which samples make up step n
packing.py    a global batch -> the rows of every rank's micro-batches
"""
