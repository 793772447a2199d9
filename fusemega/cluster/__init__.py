"""Slurm: jobs submitted for a run or a recipe, and how far they are. The jobs' own logic is in slurm/ (`lib.sh`).

Submitting
    request.py        what is asked of Slurm for a job; the site's file
    plan.py           what a training job will do, and how long it takes
    chain.py          a recipe's graph as jobs
    script.py         the text of a job script
    submit.py         files and jobs: all of them, or none
    launch.py         `fusemega launch`, from the file to the jobs
Looking
    jobs_file.py      which jobs were submitted for a folder
    progress.py       how far a training run is; stages.py: a recipe
    status.py         `fusemega status`; status_lines.py: as lines for a terminal
Both
    slurm.py          Slurm's commands
"""
