"""Which responses are right, by the verifiers of `fusemega verify`, each response once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from fusemega.errors import UserError
from fusemega.passes.progress import progress
from fusemega.reward.code import Program, code_verdicts
from fusemega.reward.maths import maths_verdicts, need_math_verify
from fusemega.reward.rows import key_of
from fusemega.reward.sandbox import find_sandbox
from fusemega.reward.verdict import Verdict
from fusemega.runtime.console import say
from fusemega.runtime.workers import default_workers
from fusemega.sampling.prompts import Prompt, Prompts
from fusemega.switch.run_file import LabelSettings

MATHS, CODE = "maths", "code"
_RECORD_SECONDS = 1.0  # of work that a kill may cost


class Asked(NamedTuple):
    """A response to be verified: its prompt and its text, without the reasoning before it."""

    prompt: Prompt
    text: str

    @property
    def key(self) -> str:
        """What is judged, and by what."""
        about = self.prompt.about
        task = [about["answer"]] if kind_of(self.prompt) == MATHS else [about["tests"], about.get("entry_point")]
        return key_of(kind_of(self.prompt), task, self.text)


def kind_of(prompt: Prompt) -> str:
    """What verifies the responses to a prompt: `MATHS` or `CODE`; "" where nothing does."""
    if "tests" in prompt.about and prompt.about.get("domain") != MATHS:
        return CODE
    return MATHS if "answer" in prompt.about and prompt.about.get("domain") != CODE else ""


def verifiable(prompts: Prompts, settings: LabelSettings, name: str) -> Prompts:
    """The prompts whose responses can be verified; before anything is sampled.

    Args:
        prompts: of a set.
        settings: whether the others are an error.
        name: of the set, for messages.

    Raises:
        UserError: names the row, the package or the sandbox that is missing.
    """
    kept = {key: prompt for key, prompt in prompts.by_key.items() if kind_of(prompt)}
    others = [prompt for key, prompt in prompts.by_key.items() if key not in kept]
    if others and (settings.unverifiable == "error" or not kept):
        raise UserError(
            f"{others[0].source}: the row has neither answer nor tests, so nothing tells whether a response is right "
            "(labels.unverifiable: skip leaves such rows out)"
        )
    if others:
        say(f"{name}: left out {len(others)} prompts with neither answer nor tests")
    kinds = {kind_of(prompt) for prompt in kept.values()}
    if MATHS in kinds:
        need_math_verify()
    if CODE in kinds:
        say(f"programs run under {find_sandbox(settings.code.sandbox).name}")
    return replace(prompts, by_key=kept)


def verify(
    asked: Sequence[Asked],
    settings: LabelSettings,
    known: Mapping[str, Sequence[Any]],
    record: Callable[[Mapping[str, Sequence[Any]]], None],
) -> None:
    """Verifies what is not known yet.

    Args:
        asked: the responses; equal ones are verified once.
        known: `Asked.key` -> verdict.
        record: takes verdicts as they are found.
    """
    missing = {each.key: each for each in asked if each.key not in known}
    for kind in (MATHS, CODE):
        of_kind = {key: each for key, each in missing.items() if kind_of(each.prompt) == kind}
        if not of_kind:
            continue
        say(f"{kind}: checking {len(of_kind)} different responses")
        keys, recorded = list(of_kind), time.monotonic()
        found: dict[str, Sequence[Any]] = {}
        with progress(f"checking {kind}", len(keys)) as advance:
            try:
                for place, verdict in _verdicts(kind, list(of_kind.values()), settings):
                    found[keys[place]] = verdict
                    advance(1)
                    if time.monotonic() - recorded > _RECORD_SECONDS:
                        record(found)
                        found, recorded = {}, time.monotonic()
            finally:
                if found:
                    record(found)


def verdict_of(asked: Asked, found: Mapping[str, Sequence[Any]]) -> bool | None:
    """Whether a response is right, of what `verify` recorded; None: undecided."""
    correct = found[asked.key][0]
    return correct if isinstance(correct, bool) else None


def _verdicts(kind: str, asked: Sequence[Asked], settings: LabelSettings) -> Iterator[tuple[int, Verdict]]:
    workers = settings.workers or default_workers()
    if kind == MATHS:
        return maths_verdicts([(a.prompt.about["answer"], a.text) for a in asked], settings.maths.timeout, workers)
    programs = [Program(a.text, a.prompt.about["tests"], a.prompt.about.get("entry_point")) for a in asked]
    return code_verdicts(programs, settings.code, workers)
