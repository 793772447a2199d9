"""Looking inside: what a run file names, drawn for a person to read. Nothing is trained, and no weight is read.

    rows.py     the data of a run file, and a row or a sample of it by name
    data.py     `fusemega show data`: a row token by token, and how a step's samples are packed
    layout.py   `fusemega show layout`: what each rank holds and reads
    teacher.py  `fusemega show teacher`: a stored row beside the text it is of
    page.py     the same in a terminal, or as an HTML page

A subject is a function that returns what rich can draw.
"""
