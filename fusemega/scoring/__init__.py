"""A model scored on data, forward only.

run_file.py       what the run files of `teach` and `eval` share
teach.py          `fusemega teach`: a teacher's rows into a sample store
evaluation.py     perplexity, bits per byte, distance from a reference model
evaluate.py       `fusemega eval`
"""
