"""Pages and pictures of the results of commands. Does not import torch.

page.py               a page about training runs; runs.py: what their folders hold
watched.py            its charts and its table of what monitoring found
arms_page.py          the page of a quickstart
merge_page.py         the page of a merge
prune_page.py         the page of a search for blocks to remove
switch_page.py        the page of a switcher between short and long reasoning
align_page.py         the page of a vocabulary map; align_positions.py: whether it is right, by kind of position
charts.py, plots.py   curves and bars; page_template.py: the HTML around them
"""
