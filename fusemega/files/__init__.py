"""Files: what others made is read within bounds, what is made here appears whole or not at all.

Reading: `opening`, and a reader for each form of file. Writing: `output` (files and folders that appear by a rename),
`unfinished` (long outputs, with a journal to go on from), `integrity` (sizes and hashes of a folder's files), `lock`
(one writer an output), `owned` (what may be removed or replaced). `remembered`: hashes, kept while nothing is touched.
"""
