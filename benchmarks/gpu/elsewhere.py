"""The same function on the CPU of a machine with a GPU: in a process of its own, from which the GPU is hidden.

python -m gpu.elsewhere MODULE FUNCTION ARGUMENTS.json RESULT.pt
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fusemega.runtime.lifeline import child_environment, follow_starter
from gpu.job import Job
from gpu.runner import search_path

_HIDDEN = {"FUSEMEGA_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""}


def on_cpu(job: Job, function: Callable[..., Any], **arguments: Any) -> Any:
    """What `function` returns on the CPU. Where there is no GPU it is called here.

    Args:
        function: at the top of a module; returns what `torch.save` takes: numbers, texts, tensors, and lists and
            dictionaries of them.
        arguments: of JSON.
    """
    if not job.card.is_gpu:
        return function(**arguments)
    words, result = job.work / f"{job.name}.arguments.json", job.work / f"{job.name}.result.pt"
    words.write_text(json.dumps(arguments), encoding="utf-8")
    command = [sys.executable, "-m", "gpu.elsewhere", function.__module__, function.__name__, str(words), str(result)]
    status = subprocess.run(command, env=child_environment() | _HIDDEN | {"PYTHONPATH": search_path()}).returncode
    if status:
        raise RuntimeError(f"the CPU's side, {function.__name__}, ended with status {status}; the part's log says why")
    found = torch.load(result)
    result.unlink()
    return found


def main() -> None:
    follow_starter()
    module, function, arguments, result = sys.argv[1:]
    made = getattr(importlib.import_module(module), function)(**json.loads(Path(arguments).read_text(encoding="utf-8")))
    torch.save(made, result)


if __name__ == "__main__":
    main()
