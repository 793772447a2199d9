"""Two tokenizations of one text, brought together: which positions compare, which ids mean the same.

align.py            `fusemega align`: from two tokenizers to a map
vocabulary.py       what each token of a tokenizer stands for, in bytes
vocabulary_map.py   for each source id a target id, as a file
kinds.py            the kinds of maps by name
make_map.py         how each kind of map is made
pieces.py           a token of the one in pieces of the other
mined.py            the nearest of many strings by edit distance
cooccurrence.py     which of equally near tokens, by their neighbours in a corpus
positions.py        positions that end at the same byte
projection.py       a source's rows in the target's ids, by lookup
dtw.py              the published alignment: dynamic time warping of token strings
reference_rows.py   the published projection
pairs.py            counts of pairs of ids, sparse
corpus.py           the samples that two tokenizations share, over processes
counts.py           pairs of tokens that stand side by side in a corpus
project.py          `fusemega project`: a source's store in the target's ids, ahead of training
transplant.py       `fusemega transplant`: a model moved onto another vocabulary
"""
