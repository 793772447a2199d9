"""Packaging of fusemega. What was tested together is in constraints.txt; `make quickstart` installs just that."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'__version__ = "([^"]+)"', (ROOT / "fusemega" / "__init__.py").read_text(encoding="utf-8"))
README = ROOT / "README.md"

assert VERSION is not None, "fusemega/__init__.py names no version"

setup(
    name="fusemega",
    version=VERSION.group(1),
    description="Turn several trained language models into one better, or smaller, model, on Megatron-core",
    long_description=README.read_text(encoding="utf-8") if README.is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["fusemega", "fusemega.*"]),
    include_package_data=True,
    package_data={
        "fusemega.recipes": ["smollm2_order.json"],
        "fusemega.cluster": ["templates/*.sh", "templates/*.sbatch"],  # a link to slurm/
    },
    install_requires=[
        "torch>=2.6",
        # The CPU backend works around this release line by line: it refuses any other.
        "megatron-core==0.16.1",
        "transformers>=5,<6",
        "datasets",
        "tokenizers",
        "sentencepiece",
        "safetensors",
        "xxhash",
        "jinja2>=3.1.6",  # older ones have known ways out of the sandbox
        "packaging",
        "pyarrow",
        "huggingface_hub",
        # megatron-core needs psutil without declaring it: a distributed checkpoint hangs for ever where it is absent.
        "psutil",
        "nvidia-ml-py",
        "pydantic>=2",
        "pyyaml",
        "typer",
        "rich",
        "tensorboard",
        "matplotlib",
        "numpy",
        # Edit distances of the published alignments, and their paths in compiled code.
        "rapidfuzz",
        "numba",
    ],
    extras_require={
        # The range that megatron-core 0.16.1 asks for.
        "gpu": ["transformer-engine[core_cu13,pytorch]>=2.9,<2.12"],
        # transformers reads GGUF files through both.
        "gguf": ["gguf", "accelerate"],
        # Responses from an OpenAI-compatible server: sampling and judges.
        "sample": ["openai>=3"],
        # The proxy of `fusemega switch serve`.
        "serve": ["starlette", "uvicorn", "httpx2"],
        # math-verify works with three releases of antlr; 4.9 would be omegaconf's.
        "verify": ["math-verify>=0.9", "antlr4-python3-runtime==4.11.0", "latex2sympy2_extended"],
        "lm-eval": ["lm_eval"],
        "dev": [
            "pytest",
            "pytest-xdist",
            "ruff",
            "mypy",
            "types-PyYAML",
            # What the tests need of the extras, and a server for them (`transformers serve`).
            "openai",
            "fastapi",
            "starlette",
            "uvicorn",
            "httpx2",
            "math-verify",
            "antlr4-python3-runtime==4.11.0",
            "latex2sympy2_extended",
        ],
    },
    entry_points={"console_scripts": ["fusemega = fusemega.cli:main"]},
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
