"""`fusemega launch`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from fusemega.cli.run_options import OVERRIDES
from fusemega.runtime.console import say, tell


def command(
    file: Annotated[
        Path, typer.Argument(help="YAML run file of `fusemega train`, or recipe of `fusemega run`.", metavar="FILE")
    ],
    overrides: OVERRIDES = None,
    nodes: Annotated[int, typer.Option(min=1, max=100_000, help="Nodes of a job that runs as several ranks.")] = 1,
    gpus_per_node: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1024,
            help="GPUs of each node, with a rank each; default: the site's NPROC_PER_NODE, or 8.",
        ),
    ] = None,
    time: Annotated[
        str, typer.Option(metavar="TIME", help="Limit of each job, in Slurm's form; a run that needs more requeues.")
    ] = "24:00:00",
    partition: Annotated[
        str, typer.Option(help="Slurm's partition; default: SBATCH_PARTITION of the site's file, or Slurm's own.")
    ] = "",
    account: Annotated[
        str, typer.Option(help="Slurm's account; default: SBATCH_ACCOUNT of the site's file, or Slurm's own.")
    ] = "",
    env_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The site's settings, as in slurm/site.env.example; the jobs read a copy. Default: $FUSEMEGA_SITE.",
            envvar="FUSEMEGA_SITE",
            show_envvar=False,
        ),
    ] = None,
    cpus_per_gpu: Annotated[int, typer.Option(min=1, max=1024, help="Cores of each rank.")] = 8,
    shared: Annotated[
        bool,
        typer.Option("--shared", help="Let other jobs have what is left of the nodes."),
    ] = False,
    sbatch: Annotated[
        list[str] | None, typer.Option(metavar="OPTION", help="One more option for sbatch, as in --sbatch=--qos=high.")
    ] = None,
    until: Annotated[
        str | None,
        typer.Option("--until", metavar="STAGE", help="Of a recipe: jobs for this stage and what it needs, no others."),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="Check the settings and the layout, and open neither models nor data; the job does it."
        ),
    ] = False,
    print_: Annotated[
        bool, typer.Option("--print", help="Write the script to stdout and the plan to stderr; submit nothing.")
    ] = False,
) -> None:
    """Submit a training run to Slurm, or a recipe as a chain of jobs, after all of it was checked.

    The plan is shown; the job script is written into `slurm/` in the output folder, with a copy of the settings, which
    the jobs read; then it is submitted. A run that meets its time limit, or is preempted, saves and requeues itself
    until it is finished. `fusemega status` shows how far it is.

    Of a recipe, each stage that has to run becomes a job, after those that it needs; stages that may run side by side
    become a job array. A stage that trains or teaches runs over all nodes and GPUs, any other as one process. If one
    fails, those that need it are cancelled, and the same command submits what is left. `fusemega run` finds what jobs
    have finished.
    """
    from fusemega.cluster.request import JobRequest, Site, ranks_per_node, read_site, use_caches

    site = Site() if env_file is None else read_site(env_file)
    use_caches(site)
    from fusemega.cluster.launch import (  # after the caches: libraries read these when they are imported
        LaunchOrder,
        launch,
    )

    request = JobRequest(
        nodes=nodes,
        gpus_per_node=ranks_per_node(gpus_per_node, site),
        time=time,
        cpus_per_gpu=cpus_per_gpu,
        exclusive=not shared,
        options=tuple(sbatch or ()),
        partition=partition,
        account=account,
        site=site,
    )
    order = LaunchOrder(file, tuple(overrides or ()), request, f"fusemega {shlex.join(sys.argv[1:])}", quick, until)
    launch(order, printing=print_, show=say if print_ else tell)
