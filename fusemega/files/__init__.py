"""Files on disk: others' files are read within limits; our own appear complete or not at all.

Reading
    opening.py            opens regular files of a bounded size
    json_files.py, yaml_files.py, npz_files.py, parquet_files.py, pickles.py, safetensors_header.py, tokenizer_files.py
                          one reader for each form of file
    sizes.py              sizes as users write them, such as 5GB
Writing
    output.py             files and folders that appear by a rename
    unfinished.py         long outputs with a journal, which can be resumed
    results_journal.py    results that are recorded as they are found, until the file of all of them appears
    integrity.py          sizes and hashes of a folder's files
    lock.py               one writer for each output
    owned.py              what a command may remove or replace
    cache.py              where things that can be made again are kept
    remembered.py         hashes of files, kept while the files are not touched
Planning
    boxes.py, moves.py    parts of tensors, and which bytes of which files they are
"""
