"""Groups of scored responses, by hand and at random."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusemega.selection.protocol import Candidate, CandidatePrompt

Said = tuple[str, float] | tuple[str, float, bool | None]


def prompt(*responses: Said, domain: str = "", key: str = "k") -> CandidatePrompt:
    """A prompt with responses (source, reward, correct); their texts are numbered, and all differ."""
    candidates = [
        Candidate(i, said[0], said[1], said[2] if len(said) > 2 else None, length=10 + i, same=i)
        for i, said in enumerate(responses)
    ]
    return CandidatePrompt(
        key, tuple(candidates), domain, verified=all(len(said) > 2 for said in responses), place="f:1"
    )


def row(text: str, *responses: Said, **more: Any) -> dict[str, Any]:
    """A row of a groups file."""
    said = [
        {"source": each[0], "sample": i, "text": f"answer {i} to {text}", "reward": each[1]}
        | ({"correct": each[2]} if len(each) > 2 else {})
        for i, each in enumerate(responses)
    ]
    return {"prompt": text, "responses": said, **more}


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def drawn(rng: random.Random, prompts: int, domains: Sequence[str], sources: int = 3) -> list[dict[str, Any]]:
    """Rows with random rewards (many of them equal), some equal texts, verdicts where the domain has them."""
    rows = []
    for number in range(prompts):
        domain = rng.choice(domains)
        responses = []
        for source in range(sources):
            for sample in range(rng.randint(1, 4)):
                text = f"answer {rng.randint(0, 5)} of {source} to {number}"
                # A text has one reward and one verdict, however often it was sampled.
                own = random.Random(text)
                said: dict[str, Any] = {"source": f"model {source}", "sample": sample, "text": text}
                said["reward"] = own.randint(0, 30) / 100
                if domain in ("maths", "code"):
                    said["correct"] = own.choice([True, False, False, None])
                responses.append(said)
        about: dict[str, Any] = {"domain": domain, "id": f"p{number}"}
        if rng.random() < 0.5:
            about["dataset"] = rng.choice(["set a", "set b"])
        rows.append({"prompt": f"question {number}: {rng.random()}", "responses": responses, **about})
    return rows
