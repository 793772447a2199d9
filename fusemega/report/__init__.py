"""Pages and pictures of what commands found. Without torch.

page.py               a page about training runs; runs.py: what their folders hold
arms_page.py          the page of a quickstart
merge_page.py         the page of a merge
align_page.py         the page of a vocabulary map
charts.py, plots.py   curves and bars; page_template.py: the HTML they stand in
"""
