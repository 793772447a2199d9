"""Blocks removed from a trained model: attention and MLP blocks, each with its norms, by BlockPruner's search.

apply.py    a model written without the first blocks of an order
order.py    which blocks are removed, in which order, and the files that say so
"""
