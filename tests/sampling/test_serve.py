"""The engine `openai` against a real `transformers serve`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fusemega.config import validate
from fusemega.errors import UserError
from fusemega.sampling.run_file import SampleRun
from fusemega.sampling.sample import sample
from tests.sampling.conftest import write_prompts
from tests.sampling.serving import serving


def test_a_real_server(small_model: Path, tmp_path: Path) -> None:
    prompts = write_prompts(
        tmp_path / "prompts.jsonl", ["Name a colour.", {"prompt": "And a number?", "system": "Hi."}]
    )

    def run(output: str, n: int = 2, **engine: Any) -> SampleRun:
        # The folder's generation settings would take the most probable token (top_k: 1) and penalise repetitions.
        drawn = json.dumps({"do_sample": True, "top_k": 0, "repetition_penalty": 1.0})
        section = {
            "source": "served",
            "prompts": {"path": str(prompts)},
            "output": str(tmp_path / output),
            "engine": {
                "name": "openai",
                "base_url": address,
                "model": str(small_model),
                "tokenizer": str(small_model),  # the server's count of prompt tokens is the template's
                "concurrency": 1,
                "max_retries": 0,
                "extra_body": {"generation_config": drawn},
            }
            | engine,
            "sampling": {"n": n, "max_tokens": 6, "temperature": 1.5},
        }
        return validate(SampleRun, section, "test")

    with serving(small_model, tmp_path / "server.log") as address:
        found = sample(run("a.jsonl"))
        assert (found.responses, found.new) == (4, 4) and found.tokens > 0 and found.prompt_tokens > 0
        sample(run("b.jsonl"))
        assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "b.jsonl").read_text(), "seeds hold, one at a time"
        assert len({json.loads(line)["text"] for line in (tmp_path / "a.jsonl").read_text().splitlines()}) > 2
        with pytest.raises(UserError, match=r"does not have 'another'; it lists: none .*Server is pinned to"):
            sample(run("c.jsonl", model="another"))
        with pytest.raises(UserError, match=r"refuses all of the first 4 requests: HTTP 422: .*no_such_field"):
            sample(run("c.jsonl", extra_body={"no_such_field": 1}))
    assert sample(run("a.jsonl")).new == 0, "no server is needed for what is there"
    with pytest.raises(UserError, match="no server answers"):
        sample(run("a.jsonl", n=3))
