"""Benchmarks of a model: answers to a data set's questions, and what they are worth; log-probabilities of its texts.

    run_file.py          run file of `fusemega tasks`
    run.py               all tasks of a run, in order
    results.py           tasks.json, and the table on the terminal
    task.py              what a task is, and tasks by name
    answers.py           a task's questions, asked and recorded as `fusemega sample` does it
    lm_eval.py           tasks of the Language Model Evaluation Harness, in a process of its own
Tasks that ask, one file each
    gsm8k.py             exact match of a number; numbers.py: numbers in texts
    humaneval.py         programs that pass their tests: pass@k
    alpaca_eval.py       outputs that the `alpaca_eval` tool judges
    arena_hard.py        answers that Arena-Hard-Auto judges
Tasks that read log-probabilities
    log_probs.py         `bits_per_byte`, and `pairs`
"""
