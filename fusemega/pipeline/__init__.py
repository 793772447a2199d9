"""A recipe's work as a graph of stages: each stage runs once, and again when what it was made from has changed.

A stage is plain data: a command of fusemega (or a Python function of a recipe), the files that it reads, the files that
it makes. So one graph can be checked, printed, and run here. ("Pipeline stage of a model", in `models/stages.py`, is
another thing: the layers of one pipeline-parallel rank.)

* `stage.py`: a stage; `functions.py`: the functions that a stage may call; `call.py`: calls one by hand
* `graph.py`: stages joined by the paths that they make and read; refuses circles, unknown inputs, shared outputs
* `record.py`: what is written down of a stage, its identity, and what has changed since
* `scope.py`: what is asked of a graph: up to a stage, from a stage on again
* `verdict.py`: which stages would run, and why
* `alone.py`: one stage by itself, for a batch job
* `run.py`: runs a graph on this machine: resumes, stops, goes on where a failure does no harm
"""
