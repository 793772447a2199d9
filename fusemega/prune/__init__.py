"""Blocks removed from a trained model: attention and MLP blocks, each with its norms, by BlockPruner's search.

order.py    which blocks are removed, in which order, and the files that say so
"""
