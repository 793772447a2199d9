"""Blocks removed from a trained model: attention and MLP blocks, each with its norms, by BlockPruner's search.

apply.py    a model written without the first blocks of an order
order.py    which blocks are removed, in which order, and the files that say so
search.py   `fusemega prune search`; run_file.py: run files; outputs.py: what a search writes
  calibration.py   the data that perplexities are measured on
  stage.py         the blocks of this rank, run one by one; masked_runs.py: runs that begin where the input has changed
  costs.py         cross-entropy and perplexity; constraint.py: which blocks may be removed next
  rounds.py        the search's rounds, exact and fast; savings.py: parameters and cache that blocks have
  measures/        other measures of importance
evaluate.py `fusemega prune eval`
"""
