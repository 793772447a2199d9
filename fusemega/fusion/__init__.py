"""What a target model is taught at each position: sparse distributions over its own ids, from one teacher or several.

targets.py        the distributions, their temperature and tail, mixtures
teacher_rows.py   one teacher's open store, and the rows of samples in it
partitions.py     cells of several ids, and what the kernel is asked for them
teacher_store.py  its rows as targets, seen through a vocabulary map where the tokenizers differ
evidence.py       how probable rows make the labels, by kind of position
functions.py      several teachers into one: MinCE, AvgCE, blend
"""
