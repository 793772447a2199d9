"""Ranks of a command, started and watched.

* `local.py`: several processes on this machine; `ranks.py`: their ends, and what is said of them
* `preloaded.py`: what they import, once for all
"""
