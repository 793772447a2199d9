"""Training sets from scored responses, by published protocols; and the sets that others have published. Without torch.

protocol.py      what a protocol is, and how prompts are divided among the sets; protocols/: one file each
groups.py        reads groups of responses; texts.py: their texts, kept on disk
ngrams.py        near-duplicates, and texts that prompts must not contain; known_texts.py: reads these
select.py        `fusemega select`; run_file.py: its settings; rows.py: the rows that it writes
summary.py       the numbers of a selection; page.py: its page, with examples.py
published.py     `fusemega published`: FuseChat-3.0's sets, converted and counted
"""
