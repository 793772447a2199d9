"""Starts and watches the ranks of a command.

* `local.py`: starts several processes on this machine; `ranks.py`: waits for their ends and reports failures
* `preloaded.py`: the imports that forked ranks share
"""
