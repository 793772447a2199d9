"""`fusemega preflight`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fusemega.cli.run_options import NPROC, OVERRIDES, launch_or_continue
from fusemega.runtime.console import tell


def command(
    run_file: Annotated[
        Path | None, typer.Argument(help="YAML run file of the job: its folders are looked at.", show_default=False)
    ] = None,
    overrides: OVERRIDES = None,
    nproc: NPROC = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for which a rank is waited for.")] = 120.0,
    gpus_per_node: Annotated[
        int | None,
        typer.Option(
            min=0, help="GPUs that each node must have. Default: SLURM_GPUS_ON_NODE, else what other nodes have."
        ),
    ] = None,
    min_bandwidth: Annotated[
        float | None,
        typer.Option(
            min=0, help="GB/s that the largest all-reduce must have (bus bandwidth). Default: it is only shown."
        ),
    ] = None,
    exclude_file: Annotated[
        Path | None,
        typer.Option(help="Add the names of bad nodes to this file, one a line, for sbatch --exclude."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, for machines.")] = False,
) -> None:
    """Check the nodes of a job from inside it, before it computes. Start it as the job's ranks will be started.

    Compares versions on all nodes, looks at the GPUs, at the folders of RUN_FILE, and does an all-reduce. Each bad node
    is named in one line. Nothing is left behind but the file of bad nodes. Exits with status 1 if anything is wrong.
    """
    from fusemega.config import load
    from fusemega.runtime.layout import ParallelConfig
    from fusemega.training.run_file import TrainRun

    run = None if run_file is None else load(TrainRun, run_file, overrides or [])
    if launch_or_continue(nproc, ParallelConfig()):
        return
    from fusemega.preflight.preflight import NodeChecks, NodesVerdict, add_to_exclude_file, preflight
    from fusemega.runtime.parallel import environment_rank

    rank, world_size, _ = environment_rank()
    values: dict[str, Any] = {} if run is None else run.model_dump(mode="json", exclude_none=True)

    def told(verdict: NodesVerdict) -> None:
        if exclude_file is not None and verdict.bad_nodes:
            add_to_exclude_file(exclude_file, verdict.bad_nodes)
        if as_json:
            tell(json.dumps(verdict.as_json(), indent=1))
        else:
            for line in _lines(verdict):
                tell(line)

    verdict = preflight(NodeChecks(values, timeout, gpus_per_node, min_bandwidth), rank, world_size, told)
    if verdict.problems:
        sys.exit(1)


def _lines(verdict: Any) -> list[str]:
    """What is said of a verdict."""
    lines = [
        f"all-reduce of {each.bytes / (1 << 20):g} MiB, {'all ranks' if each.group == 'all' else each.group}: "
        f"{each.gb_per_second:.3g} GB/s, {each.seconds * 1e3:.3g} ms"
        for each in verdict.all_reduce
    ]
    lines += [problem.line for problem in verdict.problems]
    counted = f"{verdict.ranks} rank(s) on {len(verdict.nodes)} node(s) ({', '.join(verdict.nodes[:8])})"
    return [*lines, f"preflight: {'NOT passed' if verdict.problems else 'passed'}, {counted}"]
