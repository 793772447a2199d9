# shellcheck shell=bash
# What the job scripts share. Source it from a batch script that begins as slurm/train.sbatch does; it starts nothing by
# itself. Everything that it reads from the environment is in the table of slurm/README.md.
#
# A script calls, in this order:
#   read_site                         the site's settings: $FUSEMEGA_SITE, else site.env beside this file. A variable
#                                     of the table that is set in the environment wins.
#   require_file WHAT PATH            refuses a file that cannot be read
#   open_job FOLDER                   what the job remembers between its starts lies in FOLDER (made here):
#                                       jobs.tsv   a line for each start and each end: start|end, time, job (ID, or
#                                                  ID_TASK of an array), restart count, progress, nodes or verdict
#                                       refused    the line of a user's error; such an end is not tried again
#   run_until_done KIND WORDS...      runs `fusemega WORDS...`, and ends the script: exit 0 when done, 1 given up, 2
#                                     refused; or the job is requeued. KIND: ranks (NPROC_PER_NODE processes on each
#                                     node, by torchrun or as a task each) or single (one process on the first node)
# and defines, before run_until_done:
#   is_done                           a function: status 0 when nothing is left to do. Default: the command's own status
#                                     ($status) is 0
#   progress                          a function: prints what changes when work was made durable
#   preflight=(WORDS...)              arguments of `fusemega preflight`, which then checks the nodes before each start
#   when_done                         a function, if something else is to do then; its status 1: the job has failed
#   stop_signal=USR1                  what makes the command save and stop. TERM (the default) for commands that keep
#                                     what is written whenever they end
#   saves=FILE                        where the command notes how long its saves take (train: OUTPUT_DIR/saves.jsonl)
#   short_step AT WORDS...            in when_done, or before run_until_done: `fusemega WORDS...` as one process. If it
#                                     fails, the script ends as after the command (refused, given up, requeued), at
#                                     progress AT
#   started_again OUT                 a function for commands that refuse to write OUT again: ends the script where a start
#                                     before this one has made it
# Also there: run_file_value FILE KEY WORDS... (a top-level value of a run file, or of a word KEY=VALUE), say TEXT, refuse
# TEXT (one line on stderr, exit 2), site_words NAME (a variable, split into `words`).

site_variables=(
    PYTHON NPROC_PER_NODE LAUNCHER TORCHRUN SRUN_ARGS CONTAINER_IMAGE CONTAINER_MOUNTS CONTAINER_WORKDIR
    MAX_RESTARTS MAX_STALLS STOP_MARGIN PREFLIGHT PREFLIGHT_MIN_BANDWIDTH SERVE_COMMAND SERVE_PORT SERVE_KEY
    FUSEMEGA_CACHE HF_HOME NCCL_IB_HCA NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME NCCL_DEBUG CUDA_DEVICE_MAX_CONNECTIONS
    TORCH_NCCL_AVOID_RECORD_STREAMS NCCL_NVLS_ENABLE PYTORCH_CUDA_ALLOC_CONF OMP_NUM_THREADS
)
stop_signal=TERM
saves=
preflight=()
steps=0
step=
status=
watch=
started=0
near_end=0
decided=0

say() { echo "$(date '+%F %T') job: $*"; }

refuse() {
    echo "error: $*" >&2
    exit 2
}

site_words() { read -ra words <<<"${!1:-}"; }

read_site() {
    local file=${FUSEMEGA_SITE:-$FUSEMEGA_SLURM/site.env} given name
    declare -A given=()
    [[ -n ${SLURM_JOB_ID:-} ]] || refuse "$0: not in a Slurm job; submit it: sbatch $0 ..."
    for name in "${site_variables[@]}"; do
        [[ -v $name ]] && given[$name]=${!name}
    done
    if [[ -r $file ]]; then
        name=$(bash -n "$file" 2>&1) || refuse "${name//$'\n'/ }"
        set -a
        # shellcheck disable=SC1090  # the site's own file
        . "$file" || refuse "$file: its last command failed"
        set +a
        while IFS= read -r name; do
            [[ -n ${!name} ]] || refuse "$file: $name has no value; fill it in, or take the line out"
        done < <(sed -nE 's/^[[:space:]]*(export[[:space:]]+)?([A-Za-z_][A-Za-z0-9_]*)=.*/\2/p' "$file")
        for name in "${!given[@]}"; do
            export "$name=${given[$name]}"
        done
    elif [[ -n ${FUSEMEGA_SITE:-} ]]; then
        refuse "FUSEMEGA_SITE: $file cannot be read"
    else
        say "no $file: the environment's own settings are used"
    fi
    _check_settings
    # Slurm gives this to the batch script and no longer to srun (since 22.05), which would then give a task one core.
    [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK:-$SLURM_CPUS_PER_TASK}
    export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
    export TORCH_NCCL_AVOID_RECORD_STREAMS=${TORCH_NCCL_AVOID_RECORD_STREAMS:-1}
    export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0}
    export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
}

_check_settings() {
    local name found
    PYTHON=${PYTHON:-python3} LAUNCHER=${LAUNCHER:-torchrun}
    MAX_RESTARTS=${MAX_RESTARTS:-20} MAX_STALLS=${MAX_STALLS:-3} PREFLIGHT=${PREFLIGHT:-0}
    for name in NPROC_PER_NODE MAX_RESTARTS MAX_STALLS STOP_MARGIN SERVE_PORT; do
        # Without zeros in front, which would make it octal.
        [[ ${!name:-0} =~ ^(0|[1-9][0-9]{0,8})$ ]] || refuse "$name: found '${!name}'; expected a number, such as 8"
    done
    [[ ${PREFLIGHT_MIN_BANDWIDTH:-0} =~ ^[0-9]+(\.[0-9]+)?$ ]] ||
        refuse "PREFLIGHT_MIN_BANDWIDTH: found '$PREFLIGHT_MIN_BANDWIDTH'; expected GB/s, such as 100"
    [[ $LAUNCHER == torchrun || $LAUNCHER == srun ]] ||
        refuse "LAUNCHER: found '$LAUNCHER'; allowed: torchrun (one task a node), srun (one task a process)"
    [[ $PREFLIGHT == 0 || $PREFLIGHT == 1 || $PREFLIGHT == exclude ]] ||
        refuse "PREFLIGHT: found '$PREFLIGHT'; allowed: 0 (none), 1 (check the nodes), exclude (and leave bad ones out)"
    if [[ -n ${CONTAINER_MOUNTS:-}${CONTAINER_WORKDIR:-} && -z ${CONTAINER_IMAGE:-} ]]; then
        refuse "CONTAINER_IMAGE is not set, but CONTAINER_MOUNTS or CONTAINER_WORKDIR is; set it, or neither"
    fi
    # In a container this shell's Python is another one.
    if [[ -z ${CONTAINER_IMAGE:-} ]] && ! found=$("$PYTHON" -c 'import fusemega' 2>&1); then
        refuse "PYTHON=$PYTHON: cannot import fusemega on $(hostname) (${found##*$'\n'}); set PYTHON in site.env"
    fi
    if [[ $PREFLIGHT != 0 && -z ${CONTAINER_IMAGE:-} ]] && ! "$PYTHON" -c 'import fusemega.cli.preflight' 2>/dev/null; then
        refuse "PREFLIGHT=$PREFLIGHT: the fusemega of PYTHON=$PYTHON has no command preflight; set it to 0, or update fusemega"
    fi
}

require_file() {
    [[ -f $2 && -r $2 ]] || refuse "$1: $2 is not a file that can be read (from $PWD)"
}

run_file_value() {
    local found word
    found=$(sed -nE "s/^$2:[[:space:]]*[\"']?([^\"'#]*[^\"'#[:space:]]).*/\1/p" "$1" | head -n 1)
    for word in "${@:3}"; do
        [[ $word != "$2="* ]] || found=${word#*=}
    done
    echo "$found"
}

open_job() {
    job_folder=$1
    { mkdir -p "$job_folder" && : >>"$job_folder/jobs.tsv"; } 2>/dev/null ||
        refuse "$job_folder: cannot be written by $(id -un) on $(hostname)"
    job_folder=$(cd "$job_folder" && pwd)
    export FUSEMEGA_REFUSED=$job_folder/refused
    rm -f "$FUSEMEGA_REFUSED"
    trap _on_usr1 USR1
    trap _on_term TERM
}

# Lines of this job alone: a job that is submitted again by hand has all its tries before it.
_note() {
    printf '%s\t%s\t%s\t%s\t%s\t%s\n' "$1" "$(date +%FT%T)" "$(_job_name)" "${SLURM_RESTART_COUNT:-0}" "$2" "$3" \
        >>"$job_folder/jobs.tsv"
}

# How many of this job's last starts in a row began at this progress.
_stalls() {
    awk -F '\t' -v job="$(_job_name)" -v at="$1" \
        '$1 == "start" && $3 == job { n = $5 == at ? n + 1 : 0 } END { print n + 0 }' "$job_folder/jobs.tsv"
}

# The name that scancel and scontrol know this job by. The bare number of an array's first task is the whole array's.
_job_name() {
    if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then
        echo "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    else
        echo "$SLURM_JOB_ID"
    fi
}

# Seconds before the end of a job of $1 seconds at which the command is told to save: twice the slowest save and the
# slowest step of those noted last, and a minute; 600 while nothing is known; STOP_MARGIN where it is set. At most half
# of the job (a quarter while nothing is known), so that something is done in it.
_margin() {
    local margin=${STOP_MARGIN:-} most=$(($1 / 2))
    if [[ -n $margin ]]; then
        :
    elif [[ -s $saves ]]; then
        margin=$(tail -n 20 "$saves" | awk '
            { for (i = 1; i < NF; i++) {
                if ($i ~ /"save-time":$/ && $(i + 1) + 0 > save) save = $(i + 1) + 0
                if ($i ~ /"iteration-time":$/ && $(i + 1) + 0 > iteration) iteration = $(i + 1) + 0 } }
            END { print int(2 * (save + iteration)) + 60 }')
    else
        margin=600 most=$(($1 / 4))
    fi
    echo $((margin < most ? margin : most))
}

# A field of `scontrol show job` that is a time, in seconds since 1970; status 1 if it is none (a job without a limit).
_job_time() {
    local text
    text=$(scontrol show job "$(_job_name)" 2>/dev/null | sed -nE "s/.* ?$1=([^ ]+).*/\1/p" | head -n 1)
    [[ -n $text ]] && date -d "$text" +%s 2>/dev/null
}

# In the background: sends this shell USR1 when the time limit is near. The limit may be changed while the job runs,
# and the first saves say how long one takes: both are looked at again every five minutes at most.
_watch_time() {
    local begun end left margin
    while kill -0 $$ 2>/dev/null; do
        if begun=$(_job_time StartTime) && end=$(_job_time EndTime); then
            margin=$(_margin $((end - begun)))
            left=$((end - $(date +%s) - margin))
            if ((left <= 0)); then
                say "$((left + margin)) s until the time limit"
                kill -USR1 $$
                return
            fi
        else
            left=300
        fi
        sleep $((left < 300 ? left : 300))
    done
}

# The step's processes ignore the signal until they can act on it, so it is sent until they have ended.
_stop_step() {
    while kill -0 "$1" 2>/dev/null; do
        scancel --signal="$stop_signal" "$(_job_name).$2" 2>/dev/null
        sleep 10
    done
}

_on_usr1() {
    ((near_end)) && return
    near_end=1
    say "USR1: the command is asked to save and stop ($stop_signal)"
    [[ -z $step ]] || _stop_step "$step" $((steps - 1)) &
}

_on_term() {
    decided=1
    say "TERM: Slurm has decided what comes next"
}

# Starts a step in the background: srun's options, then -- and a command. Sets `step`, its process.
_start() {
    local -a words srun=(srun --kill-on-bad-exit=1)
    if [[ -n ${CONTAINER_IMAGE:-} ]]; then
        srun+=("--container-image=$CONTAINER_IMAGE")
        [[ -z ${CONTAINER_MOUNTS:-} ]] || srun+=("--container-mounts=$CONTAINER_MOUNTS")
        [[ -z ${CONTAINER_WORKDIR:-} ]] || srun+=("--container-workdir=$CONTAINER_WORKDIR")
    fi
    site_words SRUN_ARGS
    srun+=("${words[@]}")
    while [[ $1 != -- ]]; do
        srun+=("$1")
        shift
    done
    shift
    # USR1 is for the command alone, which installs a handler of its own: until then, and in torchrun, it is ignored.
    # torchrun's rendezvous is static: PET_NODE_RANK is its --node-rank, which differs from node to node.
    # shellcheck disable=SC2016  # SLURM_NODEID is read on the node
    "${srun[@]}" bash -c 'trap "" USR1; export PET_NODE_RANK="$SLURM_NODEID"; exec "$@"' step "$@" &
    step=$!
    steps=$((steps + 1))
}

# Runs `fusemega WORDS...` on the job's nodes and waits for its end, whatever signals this shell gets. Sets `status`.
_step() {
    local kind=$1 nproc=${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}
    local -a words launch=("$PYTHON") srun=()
    shift
    if [[ $kind == single ]]; then
        srun=(--nodes=1 --ntasks=1)
    else
        MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
        # Another one at each start: it may be taken on that node.
        MASTER_PORT=$((20000 + (SLURM_JOB_ID + 997 * ${SLURM_RESTART_COUNT:-0} + 101 * steps) % 20000))
        export MASTER_ADDR MASTER_PORT
        if [[ $LAUNCHER == srun ]]; then
            srun+=("--ntasks-per-node=$nproc" "--ntasks=$((nproc * SLURM_JOB_NUM_NODES))")
            [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || srun+=("--cpus-per-task=$((SLURM_CPUS_PER_TASK > nproc ? SLURM_CPUS_PER_TASK / nproc : 1))")
        else
            srun+=(--ntasks-per-node=1 "--ntasks=$SLURM_JOB_NUM_NODES")
            site_words TORCHRUN
            ((${#words[@]})) || words=("$PYTHON" -m torch.distributed.run)
            launch=("${words[@]}" "--nnodes=$SLURM_JOB_NUM_NODES" "--nproc-per-node=$nproc"
                "--master-addr=$MASTER_ADDR" "--master-port=$MASTER_PORT")
        fi
    fi
    _start "${srun[@]}" -- "${launch[@]}" -m fusemega "$@"
    # bash runs traps only between commands, and a trap ends the wait early: wait until the step is really gone.
    while :; do
        wait "$step"
        status=$?
        kill -0 "$step" 2>/dev/null || break
    done
    step=
}

is_done() { ((status == 0)); }
when_done() { :; }

started_again() {
    local hidden
    hidden=$(dirname "$1")/.$(basename "$1").incomplete
    if [[ ${SLURM_RESTART_COUNT:-0} -gt 0 && -e $1 && ! -e $hidden ]]; then
        say "$1 was finished before this start"
        exit 0
    fi
}

# Checks the nodes. Bad ones end the job by name, or are left out of its next start.
_check_nodes() {
    local bad name
    rm -f "$job_folder/bad_nodes"
    _step ranks preflight "${preflight[@]}" --exclude-file "$job_folder/bad_nodes" \
        ${PREFLIGHT_MIN_BANDWIDTH:+"--min-bandwidth=$PREFLIGHT_MIN_BANDWIDTH"}
    ((status == 0)) && return
    [[ -s $job_folder/bad_nodes ]] || return # ended from outside, or wrong without a node's fault
    bad=$(paste -sd, "$job_folder/bad_nodes")
    [[ $PREFLIGHT == exclude ]] || _end 1 "bad nodes: $bad; leave them out (sbatch --exclude=$bad), or set PREFLIGHT=exclude"
    ((${SLURM_RESTART_COUNT:-0} < MAX_RESTARTS)) || _end 1 "restarted $MAX_RESTARTS times (MAX_RESTARTS): giving up"
    # Slurm takes the nodes of a job that waits alone, and ends this script before the job waits: a small job does it.
    name=$(_job_name)
    # shellcheck disable=SC2016  # the small job's own arguments
    env -u SLURM_JOB_ID sbatch --parsable --job-name=fusemega-exclude --nodes=1 --ntasks=1 --time=30 --exclude="$bad" \
        ${SLURM_JOB_PARTITION:+"--partition=$SLURM_JOB_PARTITION"} ${SLURM_JOB_ACCOUNT:+"--account=$SLURM_JOB_ACCOUNT"} \
        --output="$job_folder/exclude-%j.out" "$FUSEMEGA_SLURM/exclude.sbatch" "$name" "$bad" >/dev/null ||
        _end 1 "bad nodes: $bad; they could not be left out, because sbatch failed"
    _note end "$(progress)" "requeue without $bad"
    say "bad nodes: $bad; requeueing without them"
    trap 'exit 0' TERM
    scontrol requeuehold "$name" || _end 1 "the job cannot be requeued; submit it again without $bad"
    sleep 120
    _end 1 "requeued, but not ended by Slurm"
}

_end_if_refused() {
    [[ ! -s $FUSEMEGA_REFUSED ]] || _end 2 "refused: $(head -n 1 "$FUSEMEGA_REFUSED")"
}

# Runs a short command of one process before or after the main one. Where it does not end well, this ends the script as
# for the main one: a start later does it again. $1: the progress.
short_step() {
    local at=$1
    shift
    stop_signal=TERM
    _step single "$@"
    ((status == 0)) && return
    say "fusemega $* ended with status $status"
    ((started)) || _note start "$at" "$SLURM_JOB_NODELIST"
    _end_if_refused
    _go_on_later "$at"
}

_end_watch() {
    [[ -z $watch ]] || kill "$watch" 2>/dev/null
}

_end() {
    _end_watch
    _note end "$(progress)" "$2"
    say "$2"
    exit "$1"
}

run_until_done() {
    local before after ran=0
    if [[ $1 == ranks && -z ${NPROC_PER_NODE:-}${SLURM_GPUS_ON_NODE:-} ]]; then
        refuse "this job has no GPUs (SLURM_GPUS_ON_NODE is not set); ask for them with --gpus-per-node, or set NPROC_PER_NODE"
    fi
    before=$(progress)
    _note start "$before" "$SLURM_JOB_NODELIST"
    started=1
    say "start ${SLURM_RESTART_COUNT:-0} of job $(_job_name) on $SLURM_JOB_NODELIST, progress: $before"
    _watch_time &
    watch=$!
    status=0
    [[ $PREFLIGHT == 0 || ${#preflight[@]} == 0 ]] || _check_nodes
    if ((status == 0 && !near_end && !decided)); then
        ran=1
        _step "$@"
    fi
    after=$(progress)
    say "the step ended with status $status, progress: $after"
    # A user's error is the same at the next start. It comes first: what is done here may be another run.
    _end_if_refused
    if ((ran)) && is_done; then
        when_done || _end 1 "failed after the command had ended well"
        _end 0 "done"
    fi
    _go_on_later "$after"
}

# Ends the script after a step that has not done its work: by Slurm, given up, or requeued. $1: the progress.
_go_on_later() {
    local stalls
    ((decided)) && _end $((status ? status : 1)) "ended by Slurm"
    # A save on a signal and a crash can end with one and the same status: progress decides, not the status.
    stalls=$(_stalls "$1")
    ((stalls >= MAX_STALLS)) && _end 1 "$stalls starts in a row without progress (MAX_STALLS): giving up"
    ((${SLURM_RESTART_COUNT:-0} >= MAX_RESTARTS)) && _end 1 "restarted $MAX_RESTARTS times (MAX_RESTARTS): giving up"
    _end_watch
    _note end "$1" "requeue"
    say "not done: requeueing"
    trap 'exit 0' TERM
    scontrol requeue "$(_job_name)" || _end 1 "the job cannot be requeued; submit it again to go on"
    sleep 120 # Slurm ends this script meanwhile
    _end 1 "requeued, but not ended by Slurm"
}
