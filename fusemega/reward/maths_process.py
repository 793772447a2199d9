"""The process that compares maths answers with math-verify, so that it can be killed.

`fusemega.reward.maths` starts this file as a script: it imports math-verify and nothing of fusemega. A question is a
line of JSON, {"answer": ..., "response": ..., "seconds": ...}, the seconds of processor time; the answer to it is one,
[correct or null, reason]. Its first line is empty: it has imported everything.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    del sys.path[0]  # this folder, so that its modules do not shadow others of the same name

import json
import logging
import os
import resource
import signal
from typing import Any

MEMORY = 2 << 30  # bytes of address space


def main() -> None:
    """Answers until there are no more questions."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # a library that prints does not answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends this process
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY if hard == resource.RLIM_INFINITY else min(MEMORY, hard), hard))
    logging.disable()  # math-verify warns that without its own alarm others have to limit the time, as is done here
    # Imports what is needed, and makes the tables of its grammar: seconds, before anybody looks at the clock.
    judged("1", "\\boxed{1}")
    replies.write("\n")
    replies.flush()
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        # The kernel ends this process, wherever it is, and also when nobody is left to do so.
        signal.setitimer(signal.ITIMER_PROF, asked["seconds"])
        replies.write(json.dumps(judged(asked["answer"], asked["response"])) + "\n")
        replies.flush()
        signal.setitimer(signal.ITIMER_PROF, 0)


def judged(answer: str, response: str) -> tuple[bool | None, str]:
    """Whether the response ends in the answer, and why."""
    from math_verify import verify

    try:
        gold = parsed_answer(answer)
    except Exception as error:
        return None, f"the right answer is not understood ({type(error).__name__})"
    if not gold:
        return None, "the right answer is not understood"
    try:
        found = _parsed(response)
        if not found:
            return False, "no answer found"
        # The first argument is the right one: the comparison is not symmetric.
        if verify(gold, found, timeout_seconds=None, raise_on_error=True):
            return True, "right"
    except MemoryError:
        return None, "out of memory"
    except Exception as error:
        return None, f"not compared ({type(error).__name__})"
    return False, "wrong"


def parsed_answer(answer: str) -> list[Any]:
    """A right answer as math-verify has it: LaTeX with or without dollars, a number, or GSM8K's `... #### 18`."""
    answer = answer.rpartition("####")[2].strip()
    # math-verify reads LaTeX only inside its delimiters.
    if "$" not in answer and "\\boxed" not in answer and "\\(" not in answer and "\\[" not in answer:
        found = _parsed(f"${answer}$")
        if found:
            return found
    return _parsed(answer)


def _parsed(text: str) -> list[Any]:
    from math_verify import parse

    return list(parse(text, parsing_timeout=None, raise_on_error=True))


if __name__ == "__main__":
    main()
