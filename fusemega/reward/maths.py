"""Maths answers, compared by math-verify in processes that can be killed.

math-verify limits its time with `signal.alarm`, which fails outside the main thread; it then calls every response
wrong. Here its alarm is off, and the clocks are the kernel's and the parent's: the result is the same from any thread,
and under asyncio.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue

from fusemega.errors import UserError
from fusemega.reward.child import Child, NoAnswer
from fusemega.reward.verdict import Verdict

SECONDS = 10.0  # of processor time for one response
_SCRIPT = Path(__file__).with_name("maths_process.py")


def check_maths(pairs: Sequence[tuple[str, str]], timeout: float = SECONDS, workers: int = 1) -> list[Verdict]:
    """Whether each response ends in its right answer, by value: 1/2 is 0.5.

    Args:
        pairs: (right answer, response). An answer is LaTeX (with or without dollars), a number, or ends in `#### 18`.
            Of a response, what a reasoning model has thought, up to the last `</think>`, is no answer.
        timeout: seconds of processor time for one response, or six times as many by the wall's clock; a comparison
            that takes longer is killed, and undecided.
        workers: processes.

    Returns:
        In the order of `pairs`.

    Raises:
        UserError: math-verify is not installed.
    """
    found = dict(maths_verdicts(pairs, timeout, workers))
    return [found[i] for i in range(len(pairs))]


def need_math_verify() -> None:
    """Refuses an environment without math-verify.

    Raises:
        UserError: names the extra.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise UserError("maths answers are compared by math-verify: pip install 'fusemega[verify]'")


def maths_verdicts(
    pairs: Sequence[tuple[str, str]], timeout: float = SECONDS, workers: int = 1
) -> Iterator[tuple[int, Verdict]]:
    """`check_maths`, as they are found: (place in `pairs`, verdict)."""
    if not pairs:
        return
    need_math_verify()
    with ExitStack() as ending:
        made = [ending.enter_context(Child(_SCRIPT)) for _ in range(min(workers, len(pairs)))]
        idle: SimpleQueue[Child] = SimpleQueue()
        for child in made:
            idle.put(child)

        def check(pair: tuple[str, str]) -> Verdict:
            child = idle.get()
            try:
                return _verdict(child, *pair, timeout)
            finally:
                idle.put(child)

        with ThreadPoolExecutor(len(made)) as threads:
            waiting = {threads.submit(check, pair): i for i, pair in enumerate(pairs)}
            try:
                for future in as_completed(waiting):
                    yield waiting[future], future.result()
            finally:  # nobody may want the rest
                threads.shutdown(wait=False, cancel_futures=True)
                for child in made:
                    child.end()


def _verdict(child: Child, answer: str, response: str, timeout: float) -> Verdict:
    # ASCII escapes, so that a line holds any text, lone surrogates included.
    question = json.dumps(
        {"answer": answer, "response": response.rpartition("</think>")[2], "seconds": timeout}
    ).encode()
    try:
        correct, reason = json.loads(child.ask(question, timeout))
    except NoAnswer as error:
        return Verdict(None, "timed out" if error.timed_out else "the comparison ended early")
    return Verdict(correct, reason)
