"""Several fine-tuned variants of one model become one, without loading the models into memory.

A plan is made first: every output tensor, its sources and its settings. Then each tensor passes block by block through
one method.

    run_file.py           the run file, in mergekit's words; settings.py: settings of one tensor
    merge.py              from run file to folder
    plan.py               what will be done, and every check; jobs.py: which tensors belong together
    dry_run.py            the plan as text, and progress
    vocabulary.py         vocabularies that differ; template.py: whose chat template
    execute.py            the plan at work; sources.py: blocks read; journal.py: what is finished
    method.py             what a method is; methods/: one in each file
    select.py             the largest elements of a tensor; signs.py, statistics.py, rounding.py: what methods share
"""
