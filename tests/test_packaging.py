"""The package's declarations agree with one another and with what is installed and tested."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fusemega
from fusemega.runtime.cpu_backend import MEGATRON_CORE_PIN

ROOT = Path(__file__).resolve().parents[1]

# Imported name -> distribution, where the two differ.
DISTRIBUTIONS = {"megatron": "megatron-core", "pynvml": "nvidia-ml-py", "yaml": "pyyaml"}
# Looked up by `fusemega env`, or imported only with an extra.
OPTIONAL = {"accelerate", "gguf", "transformer_engine", "wandb"} | {
    "openai",
    "math_verify",
    "latex2sympy2_extended",
    "lm_eval",
    "starlette",
    "uvicorn",
    "httpx2",
}


def _setup_call() -> dict[str, object]:
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    call = next(node.value for node in tree.body if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call))
    literals = ("install_requires", "extras_require", "python_requires", "entry_points")
    return {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg in literals}


def _constraints() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def test_every_declared_dependency_is_constrained_within_its_own_range() -> None:
    setup, constraints = _setup_call(), _constraints()
    extras = setup["extras_require"]
    declared = [*setup["install_requires"], *extras["gguf"], *extras["dev"]]  # type: ignore[index,misc]
    for requirement in map(Requirement, declared):
        pinned = constraints[canonicalize_name(requirement.name)]
        version = next(iter(pinned.specifier)).version
        assert version in requirement.specifier, f"{pinned} is outside {requirement}"


def test_the_pins_agree() -> None:
    constraints = _constraints()
    assert str(constraints["megatron-core"].specifier) == f"=={MEGATRON_CORE_PIN}"
    assert f"megatron-core=={MEGATRON_CORE_PIN}" in _setup_call()["install_requires"]  # type: ignore[operator]
    torch_pin = f"torch{constraints['torch'].specifier}"
    installs = [line for line in (ROOT / "Makefile").read_text().splitlines() if "$(PIP) install" in line]
    assert torch_pin in installs[0], "the first pip call pins torch"


def test_every_import_of_the_package_is_declared() -> None:
    declared = {canonicalize_name(Requirement(line).name) for line in _setup_call()["install_requires"]}  # type: ignore[attr-defined]
    undeclared = set()
    for path in (ROOT / "fusemega").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            else:
                continue
            for top in {name.partition(".")[0] for name in names} - {"fusemega"} - OPTIONAL:
                distribution = canonicalize_name(DISTRIBUTIONS.get(top, top))
                if top not in sys.stdlib_module_names and distribution not in declared:
                    undeclared.add(f"{path.relative_to(ROOT)}: {top}")
    assert not undeclared


def test_every_room_is_a_package() -> None:
    """`find_packages` leaves a folder without __init__.py out of the wheel without a word."""
    folders = {path.parent for path in (ROOT / "fusemega").rglob("*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").is_file()]


def test_the_console_script_is_the_module() -> None:
    script = _setup_call()["entry_points"]["console_scripts"][0]  # type: ignore[index]
    target = script.partition("=")[2].strip()
    module, _, function = target.partition(":")
    assert callable(getattr(__import__(module, fromlist=[function]), function))
    assert f"from {module} import {function}" in (ROOT / "fusemega" / "__main__.py").read_text()


def test_version_of_the_installed_package() -> None:
    try:
        installed = importlib.metadata.version("fusemega")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("fusemega is not installed here: run through `make test`")
    assert installed == fusemega.__version__ and re.fullmatch(r"\d+\.\d+\.\d+", installed)


@pytest.mark.parametrize(
    "script", [*sorted(f"slurm/{path.name}" for path in (ROOT / "slurm").glob("*.s*h*")), ".ci/run"]
)
def test_shell_scripts_are_clean(script: str) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("needs the program shellcheck")
    run = subprocess.run(["shellcheck", "-x", script], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
