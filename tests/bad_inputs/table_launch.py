"""Launches and status that are refused."""

from __future__ import annotations

from tests.bad_inputs.damage import put
from tests.bad_inputs.run import Bad, kind

LAUNCH = "launch train.yaml --print --gpus-per-node"

_c = kind("configuration")
_k = kind("checkpoint")

# fmt: off
TABLE: list[Bad] = [
    _c("a launch of no file", "launch nowhere.yaml --print", "nowhere.yaml: cannot read the run file: No such file"),
    _c("a layout that does not divide nodes x GPUs", LAUNCH + " 1 --nodes 3 parallel.context_parallel_size=2", "--nodes 3 --gpus-per-node 1: parallel: tensor_model_parallel_size 1 x context_parallel_size 2"),
    _c("a launch with a misspelt key", LAUNCH + " 2 training.packng=true", "training.packng: unknown key (did you mean 'packing'?)"),
    _c("a launch of data that is not there", LAUNCH + " 2 data.path=dat.jsonl", "dat.jsonl"),
    _c("a launch for no time", LAUNCH + " 2 --time 0", "--time: found '0'; allowed: MINUTES"),
    _c("a site's variable without a value", LAUNCH + " 2 --env-file site.env", "site.env:2: SBATCH_ACCOUNT has no value; fill it in", put("site.env", "# of the site\nSBATCH_ACCOUNT=\n")),
    _c("a site's variable that refers to none", LAUNCH + " 2 --env-file site.env", "site.env:1: TMPDIR refers to NO_SUCH_DISK, which is not set", put("site.env", "TMPDIR=$NO_SUCH_DISK/x\n")),
    _c("a site's file of something else", LAUNCH + " 2 --env-file model/model.safetensors", "model.safetensors: "),
    _c("a site's number of ranks that is none", "launch train.yaml --print --env-file site.env", "site.env: NPROC_PER_NODE: found 'all'; expected a number", put("site.env", "NPROC_PER_NODE=all\n")),
    _c("a launch into another folder", LAUNCH + " 2 output_dir=model", "model: exists and is not the folder of a training run"),
    _c("a launch below a file", LAUNCH + " 2 output_dir=data.jsonl/run", "data.jsonl/run: cannot write there"),
    _c("--until of a run file", LAUNCH + " 2 --until merge", "--until merge: train.yaml is a run file and has no stages; leave it out"),
    _c("--until of no stage", "launch recipe.yaml --print --gpus-per-node 2 --until merg", "--until: there is no stage 'merg' (did you mean 'merge'?)"),
    _c("another number of processes for a recipe", "launch recipe.yaml --print --gpus-per-node 2 nproc=1", "nproc=1: --nodes 1 x --gpus-per-node 2 gives 2 processes; leave nproc out"),
    _k("checkpoints of another run where one is launched", "launch resume.yaml --print --gpus-per-node 1 optimizer.lr=0.5", "iter_0000002: cannot resume: the checkpoint has optimizer"),
    _k("checkpoints of another model where one is launched", "launch resume.yaml --print --gpus-per-node 1 model.load=padded", "iter_0000002: cannot resume: the checkpoint has model"),
    _k("checkpoints of another run, by --dry-run", "train resume.yaml --dry-run training.global_batch_size=3", "iter_0000002: cannot resume: the checkpoint has "),
    _c("the status of nothing", "status nowhere", "nowhere: no such folder; give the output_dir of a run or a recipe"),
    _c("the status of a model", "status model", "model: not the folder of a training run (run.json), of a recipe (stages/), or of submitted jobs"),
    _c("a list of jobs that is none", "status run", "run/slurm/jobs.json: not a list of jobs of this version of fusemega", put("run/slurm/jobs.json", "{}")),
]
