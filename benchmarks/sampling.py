"""Responses a second of `fusemega sample`'s engine in this process, beside a plain loop of `generate`.

    python benchmarks/sampling.py [--prompts 32] [--batch-size 16] [--max-tokens 48] [--dtype fp32] [--threads 1]

SmolLM2-135M-Instruct, one response to each of the first real prompts (AlpacaEval, ASDiv, HumanEval), temperature 0.8,
top-p 0.95. The loop is what a short script does: one prompt at a time, the chat template, `generate` with sampling.
Both sides have the same weights and dtype, and take turns, a batch of prompts at a time, so that what else the machine
does falls on both. Their random numbers differ, and so do a few lengths: tokens are counted too. Times are of the clock
and of the processor. One run. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

TEMPERATURE, TOP_P = 0.8, 0.95


class Timed:
    """Responses, tokens and seconds of one side."""

    def __init__(self) -> None:
        self.responses = self.tokens = 0
        self.seconds = self.processor = 0.0

    def run(self, part: Callable[[], list[int]]) -> None:
        """Times `part`, which returns the lengths of its responses."""
        clock, processor = time.perf_counter(), time.process_time()
        lengths = part()
        self.seconds += time.perf_counter() - clock
        self.processor += time.process_time() - processor
        self.responses += len(lengths)
        self.tokens += sum(lengths)

    def figures(self) -> dict[str, float]:
        """A second of the clock, and of the processor."""
        return {
            "responses": self.responses,
            "tokens": self.tokens,
            "responses_per_second": round(self.responses / self.seconds, 3),
            "tokens_per_second": round(self.tokens / self.seconds, 2),
            "responses_per_processor_second": round(self.responses / self.processor, 3),
            "tokens_per_processor_second": round(self.tokens / self.processor, 2),
        }


def main() -> None:
    """Runs both sides and prints what they did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(asked.threads)

    import torch

    from fusemega.fixtures.data import smollm2
    from fusemega.fixtures.prompts import prompts
    from fusemega.sampling.engine import SampleRequest, SamplingSettings
    from fusemega.sampling.engines import TransformersSettings
    from fusemega.sampling.prompts import PromptsConfig, read_prompts
    from fusemega.sampling.transformers_engine import TransformersEngine

    torch.set_num_threads(asked.threads)
    found = read_prompts(PromptsConfig(path=str(prompts(200)), limit=asked.prompts)).by_key
    requests = [SampleRequest(key, prompt.messages) for key, prompt in found.items()]
    settings = SamplingSettings(temperature=TEMPERATURE, top_p=TOP_P, max_tokens=asked.max_tokens)
    engine = TransformersEngine(
        TransformersSettings(load=str(smollm2()), dtype=asked.dtype, batch_size=asked.batch_size)
    )
    plain = plain_loop(str(smollm2()), torch.float32 if asked.dtype == "fp32" else torch.bfloat16, asked.max_tokens)
    list(engine.generate(requests[:1], settings.model_copy(update={"max_tokens": 2})))  # what is done only once
    plain(requests[:1])

    def batched(part: list[SampleRequest]) -> list[int]:
        return [response.tokens or 0 for response in engine.generate(part, settings)]

    ours, loop = Timed(), Timed()
    # Neighbours in length, as a whole run has them in a batch.
    requests.sort(key=lambda request: -sum(len(message["content"]) for message in request.messages))
    for start in range(0, len(requests), asked.batch_size):
        part = requests[start : start + asked.batch_size]
        ours.run(partial(batched, part))
        loop.run(partial(plain, part))
        print(f"{start + len(part)} of {len(requests)}: {ours.figures()} {loop.figures()}", flush=True)
    speed_up = {
        "clock": round(loop.seconds / ours.seconds, 2),
        "processor": round(loop.processor / ours.processor, 2),
    }
    asked_for: dict[str, Any] = vars(asked)
    print(json.dumps({**asked_for, "engine": ours.figures(), "loop": loop.figures(), "speed_up": speed_up}))


def plain_loop(folder: str, dtype: Any, max_tokens: int) -> Callable[[list[Any]], list[int]]:
    """A function that answers one prompt at a time, and returns the lengths of the answers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def answer(part: list[Any]) -> list[int]:
        lengths = []
        for request in part:
            inputs = tokenizer.apply_chat_template(
                list(request.messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            with torch.inference_mode():
                ids = model.generate(
                    **inputs, do_sample=True, temperature=TEMPERATURE, top_p=TOP_P, top_k=0, max_new_tokens=max_tokens
                )
            tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            lengths.append(ids.shape[1] - inputs["input_ids"].shape[1])
        return lengths

    return answer


if __name__ == "__main__":
    main()
