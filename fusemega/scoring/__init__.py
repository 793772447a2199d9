"""A model scored on data, forward only.

run_file.py       what the run files of `teach`, `eval` and `score` share
teach.py          `fusemega teach`: a teacher's rows into a sample store
evaluation.py     perplexity, bits per byte, distance from a reference model
preferences.py    an objective's loss and metrics on held-out groups of responses
pair_accuracy.py  how often a pair's chosen response is the more probable one
evaluate.py       `fusemega eval`
rewards.py        `fusemega score`: a reward model's scores of responses
"""
