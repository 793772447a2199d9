"""Two tokenizations of one text, brought together: which positions compare, which ids mean the same.

positions.py        positions that end at the same byte
projection.py       a source's rows in the target's ids, by lookup
"""
