"""A run, watched while it runs: what each rank does, what its device reports, who is slow, what is odd.

Nothing here waits for a device or for other ranks inside a step.

    settings.py     `monitoring:` of a run file
    heartbeat.py    a thread that writes what this rank does into `output_dir/monitor`
    ranks.py        what all ranks do, read from there without torch; who hangs, and where
    watch.py        a thread of the first two ranks that says so in the log
    sampler.py      a thread that reads this rank's device
    stragglers.py   the rank that stays slower than its peers
    spikes.py       values that jump
    session.py      these threads, from the start of a run to its end
"""
