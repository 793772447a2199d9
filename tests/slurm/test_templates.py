"""The job scripts as files: clean, accepted by sbatch, and wrong requests refused in one line before a step starts."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.job import ROOT, Job

SLURM = ROOT / "slurm"
TEMPLATES = sorted(path.name for path in SLURM.glob("*.sbatch"))
Submit = Callable[..., Job]


def in_bash(text: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs bash after `lib.sh`, in a job that is none."""
    script = f"set -uo pipefail; FUSEMEGA_SLURM={SLURM}; . {SLURM}/lib.sh; {text}"
    environment = {"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "1", **variables}
    return subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)


def test_all_are_there() -> None:
    assert {f"{name}.sbatch" for name in ("convert", "exclude", "merge", "serve", "teach", "train")} <= set(TEMPLATES)


@pytest.mark.parametrize("name", [*TEMPLATES, "lib.sh", "site.env.example"])
def test_shellcheck(name: str, shellcheck: str) -> None:
    words = [shellcheck, "-x", "-s", "bash", *(["-e", "SC2034"] if name.endswith("example") else []), f"slurm/{name}"]
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


@pytest.mark.parametrize("name", TEMPLATES)
def test_sbatch_accepts_it_and_refuses_too_much(cluster: Cluster, name: str) -> None:
    assert "to start at" in cluster.run("sbatch", "--test-only", str(SLURM / name))
    for option in ("--cpus-per-task=65", "--no-such-option"):
        command = ["sbatch", "--test-only", option, str(SLURM / name)]
        run = subprocess.run(command, env=cluster.env, capture_output=True, text=True)
        assert run.returncode, run.stderr
    # Options after the first command would not be seen.
    text = (SLURM / name).read_text()
    assert text.rindex("\n#SBATCH") < re.search(r"^[a-z]", text, re.MULTILINE).start()  # type: ignore[union-attr]


def test_every_variable_is_in_the_table() -> None:
    """And nothing else is."""
    text = (SLURM / "lib.sh").read_text()
    found = re.search(r"^site_variables=\((.*?)\)", text, re.MULTILINE | re.DOTALL)
    assert found is not None
    table = (SLURM / "README.md").read_text().split("## Variables")[1].split("\n## ")[0]
    named = {name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert set(found[1].split()) <= named
    example = re.findall(r"^#?([A-Z_]+)=", (SLURM / "site.env.example").read_text(), re.MULTILINE)
    assert set(example) <= named


@pytest.mark.parametrize(
    ("site", "words"),
    [
        ("SBATCH_ACCOUNT=\n", "site.env: SBATCH_ACCOUNT has no value; fill it in, or take the line out"),
        ("export PYTHON=\n", "site.env: PYTHON has no value"),
        ("if\n", "site.env: line 2: syntax error"),
        ("false\n", "site.env: its last command failed"),
        ("PYTHON=/no/such/python\n", "PYTHON=/no/such/python: cannot import fusemega on "),
        ("CONTAINER_MOUNTS=/a:/a\n", "CONTAINER_IMAGE is not set, but CONTAINER_MOUNTS or CONTAINER_WORKDIR is"),
        ("MAX_RESTARTS=often\n", "MAX_RESTARTS: found 'often'; expected a number"),
        ("LAUNCHER=mpirun\n", "LAUNCHER: found 'mpirun'; allowed: torchrun"),
        ("PREFLIGHT=yes\n", "PREFLIGHT: found 'yes'; allowed: 0"),
    ],
)
def test_a_site_that_is_not_filled_in(tmp_path: Path, site: str, words: str) -> None:
    (tmp_path / "site.env").write_text(site)
    done = in_bash("read_site", FUSEMEGA_SITE=str(tmp_path / "site.env"))
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_the_environment_wins_over_the_site(tmp_path: Path) -> None:
    (tmp_path / "site.env").write_text("PYTHON=/site/python\nMAX_STALLS=7\nNCCL_IB_HCA=mlx5_0\n")
    site = {"FUSEMEGA_SITE": str(tmp_path / "site.env"), "PYTHON": "true"}
    done = in_bash('read_site; echo "$PYTHON $MAX_STALLS"; env | grep NCCL_IB', **site)
    assert done.stdout.splitlines() == ["true 7", "NCCL_IB_HCA=mlx5_0"], done.stderr


def test_outside_a_job(tmp_path: Path) -> None:
    done = subprocess.run(["bash", str(SLURM / "train.sbatch"), "x"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "not in a Slurm job; submit it: sbatch" in done.stderr
    done = in_bash("read_site", FUSEMEGA_SITE="/no/such/file")
    assert done.returncode == 2 and "FUSEMEGA_SITE: /no/such/file cannot be read" in done.stderr


@pytest.mark.parametrize(
    ("template", "words", "complaint"),
    [
        ("train.sbatch", [], "no run file; usage: sbatch slurm/train.sbatch"),
        ("train.sbatch", ["none.yaml"], "run file: none.yaml is not a file that can be read"),
        ("train.sbatch", ["empty.yaml"], "empty.yaml: has no output_dir, and none is given"),
        ("train.sbatch", ["empty.yaml", "/proc/out"], "/proc/out/slurm: cannot be written by"),
        ("teach.sbatch", ["empty.yaml"], "empty.yaml: has no store, and none is given"),
        ("convert.sbatch", ["turn", "a", "b"], "convert: found 'turn'; allowed: import, export"),
        ("merge.sbatch", ["none.yaml", "out"], "run file: none.yaml is not a file"),
        ("serve.sbatch", ["model", "command"], "found 'command'; expected -- and a command"),
    ],
)
def test_refused_before_a_step(submit: Submit, tmp_path: Path, template: str, words: list[str], complaint: str) -> None:
    (tmp_path / "empty.yaml").write_text("data: {}\n")
    job = submit(template, *words, options=["--nodes=1", *(["--array=0"] if template == "teach.sbatch" else [])])
    job.ended("FAILED")
    lines = [line for line in job.log.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and complaint in lines[0], job.log
    assert job.cluster.field(job.number, "ExitCode") == "2:0"


def test_the_library_is_not_found(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "train.sbatch").write_text((SLURM / "train.sbatch").read_text())
    number = cluster.submit("-N1", f"--output={tmp_path}/log-%j", tmp_path / "train.sbatch", "x", folder=tmp_path)
    job = Job(cluster, number, tmp_path)
    job.ended("FAILED")
    assert f"error: lib.sh is not in {tmp_path}; set FUSEMEGA_SLURM to the folder slurm/ of fusemega" in job.log
