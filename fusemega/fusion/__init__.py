"""What a target model is taught at each position: sparse distributions over its own ids, from one teacher or several.

targets.py        the distributions, their temperature and tail, mixtures
teacher_store.py  one teacher's: a sample store, seen through a vocabulary map where the tokenizers differ
functions.py      several teachers into one: MinCE, AvgCE, blend
"""
