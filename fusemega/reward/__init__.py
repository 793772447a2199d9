"""What a response is worth: whether it is right, and which of several a judge or a rule prefers.

verdict.py        what is known of one response's correctness
rows.py           rows of a prompt with responses, written again with something added
child.py          a process that answers questions, and is killed when it takes too long
maths.py          maths answers, compared by math-verify; maths_process.py: the process that compares
code.py           programs, run against test cases; extract.py: the code in a response
sandbox.py        where they run: bubblewrap, or unshare; inside/: what runs in it
verify.py         `fusemega verify`
judge.py          `fusemega judge`; comparisons.py: pairs, the judge's message, its verdict, shares of wins
rules.py          `fusemega rules`; rule_set.py: the rules
"""
