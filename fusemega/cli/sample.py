"""`fusemega sample`."""

from __future__ import annotations

from fusemega.cli.run_options import OVERRIDES, RUN_FILE


def command(run_file: RUN_FILE, overrides: OVERRIDES = None) -> None:
    """Sample one source's responses to all prompts, from a model in this process or behind a server.

    The engine `transformers` runs a Hugging Face folder here, on one device; `openai` asks an OpenAI-compatible server
    (vLLM, SGLang, `transformers serve`). Each response is recorded as soon as it is there. Run the same command again
    to go on after an interruption, or with more prompts or a larger `sampling.n`: nothing is sampled twice. Prints one
    JSON object on stdout.
    """
    from fusemega.config import load
    from fusemega.sampling.run_file import SampleRun
    from fusemega.sampling.sample import sample

    print(sample(load(SampleRun, run_file, overrides or [])).model_dump_json())
