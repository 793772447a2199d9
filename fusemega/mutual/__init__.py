"""The rules of Mutual-Taught (arXiv:2506.06292), in which policy and reward model teach each other. Without torch.

splits.py         prompts divided into portions that share none
win_rate.py       how often one policy's responses have the higher reward; which checkpoint is kept
pseudo_pairs.py   pairs of a new and an old response, and which of them are believed
mixing.py         how many pairs of two kinds are trained on together
page.py           the page of a run; figures.py: its drawings
The pairs that the policy is trained on: `selection/protocols/mutual_taught.py`.
"""
