"""What runs inside the sandbox, started by `fusemega.reward.sandbox`; it imports nothing of fusemega.

confine.py     limits that the kernel enforces: resources, system calls, and the root folder where bubblewrap is missing
plain.py       values of plain data, as bytes on a pipe
program.py     a response's program, which answers calls
cases.py       its test cases, in another sandbox, which call it
trial.py       what a sandbox lets a program do
start.py       begins one of them
"""
