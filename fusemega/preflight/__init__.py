"""`fusemega preflight`: before a job computes, whether its nodes can: the same software, sound GPUs, shared folders.

findings.py     what one rank finds on its node
gpus.py         the GPUs that it sees, and whether they multiply
shared_paths.py folders that all nodes must see alike
compare.py      what of all that is wrong, and with which node
meeting.py      where the ranks meet, with a deadline: one that does not come is named
all_reduce.py   the sum and the speed of an all-reduce
preflight.py    the whole, and what is said of it
"""
