"""Alignment of two tokenizations of one text: which positions match, and which id stands for which.

kinds.py            the kinds of maps by name
make_map.py         how each kind of map is made
vocabulary_map.py   for each source id a target id, as a file
vocabulary.py       what each token of a tokenizer stands for, in bytes
pieces.py           a token of one tokenizer in pieces of another
cells.py            sets of target ids whose probability both models can state
probes.py           texts on which two tokenizers are compared beforehand
mined.py            the nearest of many strings by edit distance
cooccurrence.py     the choice among equally near tokens, by their neighbours in a corpus
pairs.py            sparse counts of pairs of ids
counts.py           counts of pairs of tokens that are aligned in a corpus
corpus.py           the samples that two tokenizations share, over processes
positions.py        positions that end at the same byte
position_kinds.py   which of the two next tokens is longer at such a position
verdicts.py         where a map sends the text's own next token there
student_projection.py  a student's probabilities as those of the teacher's tokens, as X-Token projects them
projection.py       a source's rows with the target's ids, by lookup
dtw.py              the published alignment: dynamic time warping of token strings
reference_rows.py   the published projection
align.py            `fusemega align`: from two tokenizers to a map
project.py          `fusemega project`: a source's store with the target's ids, before training
transplant.py       `fusemega transplant`: a model moved to another vocabulary
"""
