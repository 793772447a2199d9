"""Two tokenizations of one text, brought together: which positions compare, which ids mean the same.

vocabulary.py       what each token of a tokenizer stands for, in bytes
positions.py        positions that end at the same byte
projection.py       a source's rows in the target's ids, by lookup
"""
