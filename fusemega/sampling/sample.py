"""`fusemega sample`: one source's responses to all prompts, each recorded as soon as it is there."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from fusemega.errors import UserError
from fusemega.files.lock import locked
from fusemega.runtime.console import say, warn
from fusemega.sampling.engine import Engine, Missing, SampleRequest
from fusemega.sampling.engines import open_engine
from fusemega.sampling.progress import Spent, progress
from fusemega.sampling.prompts import Prompts, read_prompts
from fusemega.sampling.responses import Made, check_responses, open_responses
from fusemega.sampling.run_file import SampleRun

_FEW = 3  # prompts whose responses may be equal by chance


class Sampled(BaseModel):
    """What a call has sampled.

    Attributes:
        prompts: different prompts.
        duplicates: rows of the prompts file whose prompt an earlier row has.
        responses: responses in the file, to these prompts.
        new: of these, made by this call.
        finish_reasons: finish_reason -> how many responses have it.
        tokens, prompt_tokens: that this call spent on the new ones.
        seconds: that they took.
        tokens_per_second: of responses.
    """

    model_config = ConfigDict(frozen=True)

    prompts: int
    duplicates: int
    responses: int
    new: int
    finish_reasons: dict[str, int]
    tokens: int
    prompt_tokens: int
    seconds: float
    tokens_per_second: float


def sample(run: SampleRun, engine: Engine | None = None) -> Sampled:
    """Samples what `run.output` lacks.

    Args:
        run: the run file.
        engine: in place of the one that the run file names.

    Raises:
        UserError: unusable prompts, engine or output, before anything is written.
        Missing: some requests got no response; the others are recorded, and the next call goes on.
    """
    prompts = read_prompts(run.prompts)
    engine = open_engine(run.engine) if engine is None else engine
    sampling = run.sampling.model_dump(mode="json", exclude={"n"})
    made = Made(run.source, dict(engine.identity), sampling, run.sampling.n)
    output = Path(run.output)
    requests = [
        SampleRequest(key, prompt.messages, number)
        for key, prompt in prompts.by_key.items()
        for number in range(run.sampling.n)
    ]
    with locked(output):
        known = check_responses(output, made)
        missing = sum((request.key, request.sample) not in known for request in requests)
        say(f"{run.source}: {missing} responses to sample; {len(requests) - missing} are there already")
        if missing:
            engine.prepare()
        spent = Spent()
        texts: dict[str, list[int]] = defaultdict(list)
        with open_responses(output, made, known) as file:
            if missing:
                with progress(missing) as (spent, advance):
                    try:
                        for response in engine.generate(requests, run.sampling, frozenset(known)):
                            file.add(prompts.by_key[response.key], response)
                            texts[response.key].append(hash(response.text))
                            advance(response)
                    except Missing as error:
                        line = f"{error}; {output} keeps the other responses: run the same command again to go on"
                        raise Missing(line, error.requests) from None
            known = file.known
    _warn_of_equal(run, texts)
    return _told(run, prompts, known, spent)


def _warn_of_equal(run: SampleRun, texts: Mapping[str, Sequence[int]]) -> None:
    """Some servers take the most probable token, whatever temperature they are asked for."""
    several = [found for found in texts.values() if len(found) > 1]
    if len(several) >= _FEW and all(len(set(found)) == 1 for found in several):
        warn(
            f"{run.source}: the responses to each prompt are all equal, with temperature {run.sampling.temperature:g}: "
            "does the server sample? (transformers serve does with do_sample, see docs/sampling.md)"
        )


def _told(run: SampleRun, prompts: Prompts, known: dict[tuple[str, int], str], spent: Spent) -> Sampled:
    of_these = {
        pair: reason for pair, reason in known.items() if pair[0] in prompts.by_key and pair[1] < run.sampling.n
    }
    wanted = len(prompts) * run.sampling.n
    if len(of_these) < wanted:
        raise UserError(f"{run.output}: the engine gave {len(of_these)} of {wanted} responses and named no fault")
    if others := len(known) - len(of_these):
        say(f"{run.output}: has {others} further responses, to other prompts or beyond sampling.n")
    reasons = Counter(of_these.values())
    told = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    line = f"{run.source}: {len(of_these)} responses ({told})"
    if spent.responses:
        line += f"; {spent.responses} new, {spent.tokens:,} tokens at {spent.tokens_per_second:,.0f}/s"
        line += f" and {spent.prompt_tokens:,} of prompts"
    say(line)
    return Sampled(
        prompts=len(prompts),
        duplicates=prompts.duplicates,
        responses=len(of_these),
        new=spent.responses,
        finish_reasons=dict(reasons),
        tokens=spent.tokens,
        prompt_tokens=spent.prompt_tokens,
        seconds=round(spent.seconds, 3),
        tokens_per_second=round(spent.tokens_per_second, 1),
    )
