#!/usr/bin/env bash
# Fine-tunes with LoRA by the published recipe, on any number of processes; `--help` has everything.
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

fail() {
    echo "error: $1" >&2
    exit 1
}

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || fail "bash 4.4 or newer is needed, this is $BASH_VERSION"

device=${DEVICE:-cuda}
nodes=${NNODES:-1}
dry_run=${DRY_RUN:-0}
hostfile=${HOSTFILE:-}
python=${PYTHON:-}
if [[ -z $python && -x $root/.venv/bin/python ]]; then python=$root/.venv/bin/python; fi
if [[ -z $python ]]; then python=$(command -v python || command -v python3) || fail "there is no python; PYTHON=… names one"; fi

order=()                     # names of the flags given, in `_` spelling
words=()                     # their values, one after the other
declare -A begin=() count=() # where in `words` a flag's values begin, and how many there are
flags=()                     # what the launch line gets

# --- flags: those given, and the recipe's where none was given -------------------------------------------------------

read_flags() {
    local word name
    for word in "$@"; do
        if [[ $word == --* ]]; then
            name=${word%%=*}
            name=${name#--}
            name=${name//-/_}
            [[ $name =~ ^[A-Za-z0-9_]+$ ]] || fail "'$word' is no flag"
            # Both names of what the batch hangs on are one flag, lest one be counted and the other act.
            if [[ $name == per_gpu_train_batch_size ]]; then name=per_device_train_batch_size; fi
            if ! is_given "$name"; then order+=("$name"); fi
            begin[$name]=${#words[@]}
            count[$name]=0
            [[ $word == *=* ]] || continue
            word=${word#*=}
        elif [[ ${#order[@]} == 0 ]]; then
            fail "'$word' stands where a flag is expected"
        fi
        words+=("$word")
        count[$name]=$((count[$name] + 1))
    done
}

is_given() { [[ -v begin[$1] ]]; }

# value NAME…: the first value of the first of these flags that was given; nothing if none was.
value() {
    local name
    for name in "$@"; do
        if is_given "$name" && ((count[$name])); then
            printf '%s\n' "${words[${begin[$name]}]}"
            return
        fi
    done
}

# is_on NAME: whether a flag was given as true, or without a value.
is_on() {
    is_given "$1" && [[ $(value "$1") =~ ^(|[Tt][Rr][Uu][Ee]|[Yy][Ee][Ss]|[TtYy1])$ ]]
}

# default NAME VALUE [OTHER NAME…]: sets a flag that was given under none of its names.
default() {
    local name
    for name in "$1" "${@:3}"; do
        if is_given "$name"; then return; fi
    done
    flags+=("--$1" "$2")
}

recipe() {
    default version v1
    default lora_enable True
    default lora_r 128
    default lora_alpha 256
    default lora_dropout 0.05
    default learning_rate 2e-5
    default mm_projector_lr 2e-5
    default lr_scheduler_type cosine
    default warmup_ratio 0.03 warmup_steps
    default weight_decay 0
    default num_train_epochs 3
    default model_max_length 2048
    default image_aspect_ratio pad
    default group_by_modality_length True group_by_length train_sampling_strategy
    default cpm_search predictions
    default dataloader_num_workers 4
    default gradient_checkpointing True activation_checkpointing
    if [[ $device == cpu ]]; then
        default use_cpu True no_cuda
        default bf16 False
        default tf32 False
    else
        if is_on fp16; then default bf16 False; else default bf16 True; fi
        default tf32 True
    fi
    if [[ $zero != 0 ]]; then default deepspeed "$root/scripts/zero$zero.json"; fi
    default per_device_train_batch_size "$per_device"
    default gradient_accumulation_steps "$accumulation"
    default logging_steps 1
    default save_strategy steps
    default save_steps 100
    default save_total_limit 2
    default report_to none
    default output_dir checkpoints/fakereasoning-lora
}

collect_flags() {
    local name
    for name in "${order[@]}"; do
        flags+=("--$name" "${words[@]:${begin[$name]}:${count[$name]}}")
    done
    recipe
}

# --- processes and batch ---------------------------------------------------------------------------------------------

need_number() {
    [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "$1 must be a whole number of at least 1, not '$2'"
}

count_processes() {
    if [[ -n $hostfile ]]; then
        [[ -z ${NUM_GPUS:-}${NNODES:-} ]] || fail "HOSTFILE already says how many GPUs there are; leave out NUM_GPUS and NNODES"
        [[ -f $hostfile ]] || fail "there is no hostfile $hostfile"
        local hosts
        read -r hosts processes < <(awk '{ sub(/#.*/, "") }
            NF && $2 !~ /^slots=[1-9][0-9]*$/ { wrong = 1 }
            NF { hosts++; slots += substr($2, 7) }
            END { print wrong ? 0 : hosts + 0, slots + 0 }' "$hostfile")
        ((hosts)) || fail "each line of $hostfile must read '<host> slots=<GPUs>'"
        if ((hosts > 1)); then
            [[ $PWD != *[[:space:]]* ]] || fail "DeepSpeed starts several hosts only from a folder without a space in its name"
            return
        fi
        # One host is this machine, which needs no ssh.
        hostfile='' num_gpus=$processes
    fi
    need_number NUM_GPUS "$num_gpus"
    need_number NNODES "$nodes"
    need_number MASTER_PORT "${MASTER_PORT:-29500}"
    processes=$((num_gpus * nodes))
    if ((nodes > 1)) && [[ $dry_run == 0 ]]; then
        [[ -n ${MASTER_ADDR:-} ]] || fail "NNODES=$nodes needs MASTER_ADDR, the address of the first node"
        [[ ${NODE_RANK:-} =~ ^[0-9]+$ ]] || fail "NNODES=$nodes needs NODE_RANK, this node's number from 0"
    fi
}

plan_batch() {
    per_device=$(value per_device_train_batch_size)
    per_device=${per_device:-8}
    need_number --per_device_train_batch_size "$per_device"
    local each=$((per_device * processes))
    accumulation=$(value gradient_accumulation_steps)
    if [[ -n $accumulation ]]; then
        need_number --gradient_accumulation_steps "$accumulation"
        global_batch=${GLOBAL_BATCH:-$((each * accumulation))}
    else
        global_batch=${GLOBAL_BATCH:-128}
    fi
    need_number GLOBAL_BATCH "$global_batch"
    ((global_batch % each == 0)) || refuse_batch "$each"
    accumulation=${accumulation:-$((global_batch / each))}
    ((each * accumulation == global_batch)) || fail \
        "--gradient_accumulation_steps $accumulation gives a global batch of $((each * accumulation)), but GLOBAL_BATCH is $global_batch; leave one of them out"
}

# refuse_batch EACH: says what would work near a global batch that is no multiple of what one step over all takes.
refuse_batch() {
    local each=$1 ways=() size number
    if ((global_batch % processes == 0)); then
        local share=$((global_batch / processes))
        size=$((per_device < share ? per_device : share))
        while ((share % size)); do size=$((size - 1)); done
        ways+=("--per_device_train_batch_size $size")
    elif [[ -z $hostfile ]]; then
        for ((number = num_gpus - 1; number > 0; number--)); do
            if fits "$number"; then ways+=("NUM_GPUS=$number") && break; fi
        done
        for ((number = num_gpus + 1; number <= 2 * num_gpus; number++)); do
            if fits "$number"; then ways+=("NUM_GPUS=$number") && break; fi
        done
    fi
    if ((global_batch > each)); then ways+=("GLOBAL_BATCH=$((global_batch / each * each))"); fi
    ways+=("GLOBAL_BATCH=$(((global_batch / each + 1) * each))")
    local said
    said=$(printf ', %s' "${ways[@]}")
    fail "a global batch of $global_batch is no multiple of $per_device per device x $processes processes; what works: ${said:2}"
}

fits() { ((global_batch % ($1 * nodes * per_device) == 0)); }

# --- what must be there before anything starts -----------------------------------------------------------------------

need_path() {
    local path
    path=$(value "$1")
    # Other names may be a hub's; the model's loader tells.
    if [[ $path =~ ^(/|\./|\.\./) && ! -e $path ]]; then fail "--$1: there is no $path"; fi
}

check_files() {
    local file
    for file in "${words[@]:${begin[data_path]}:${count[data_path]}}"; do
        [[ -f $file ]] || fail "--data_path: there is no file $file"
    done
    [[ -d $(value image_folder) ]] || fail "--image_folder: there is no folder $(value image_folder)"
    need_path model_name_or_path
    need_path vision_tower
    need_path dino_weights
    if is_given deepspeed && [[ ! -f $(value deepspeed) ]]; then fail "--deepspeed: there is no file $(value deepspeed)"; fi
}

check_machine() {
    local gpus has_deepspeed
    read -r gpus has_deepspeed < <("$python" -c '
import importlib.util, torch
print(torch.cuda.device_count(), importlib.util.find_spec("deepspeed") is not None)' 2>/dev/null) ||
        fail "$python cannot import torch; install the project there, or name another interpreter with PYTHON=…"
    if [[ $has_deepspeed == False ]] && { [[ $zero != 0 || -n $hostfile ]] || is_given deepspeed; }; then
        fail "DeepSpeed is not installed in $python; DS_BUILD_OPS=0 pip install deepspeed brings it, ZERO=0 trains without it"
    fi
    [[ $device == cuda && -z $hostfile ]] || return 0
    ((gpus)) || fail "torch sees no GPU on this machine; DEVICE=cpu trains on its CPU"
    ((gpus >= num_gpus)) || fail "NUM_GPUS is $num_gpus, but torch sees $gpus on this machine; set NUM_GPUS=$gpus"
}

# --- the launch line -------------------------------------------------------------------------------------------------

build_launch() {
    launch=(env "PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}")
    if [[ $device == cpu ]]; then
        local share=$(($(getconf _NPROCESSORS_ONLN) * nodes / processes))
        launch+=(DS_ACCELERATOR=cpu "OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((share > 1 ? share : 1))}")
    fi
    if [[ -n $hostfile ]]; then
        launch+=("$python" -m deepspeed.launcher.runner --hostfile "$hostfile")
        launch+=(${MASTER_ADDR:+--master_addr "$MASTER_ADDR"} ${MASTER_PORT:+--master_port "$MASTER_PORT"})
        launch+=(--no_local_rank --module)
    elif ((nodes > 1)) || [[ -n ${MASTER_PORT:-} ]]; then
        local address=127.0.0.1
        if ((nodes > 1)); then address=${MASTER_ADDR:-<MASTER_ADDR>}; fi
        launch+=("$python" -m llava.train.launch --nnodes "$nodes" --node_rank "${NODE_RANK:-0}")
        launch+=(--nproc_per_node "$num_gpus" --master_addr "$address" --master_port "${MASTER_PORT:-29500}" -m)
    else
        launch+=("$python" -m llava.train.launch --standalone --nproc_per_node "$num_gpus" -m)
    fi
    launch+=(llava.train.train "${flags[@]}")
}

show_help() {
    cat <<'HELP'
Fine-tunes with LoRA by the published recipe, on 8 GPUs, one GPU, several nodes, or a CPU.

  bash scripts/finetune_task_lora.sh --data_path train.json --image_folder images \
      --model_name_or_path path/or/hub-id --vision_tower openai/clip-vit-large-patch14-336 [any other flag]

Flags go to `python -m llava.train.train`, whose --help lists them all: LLaVA's, and those of transformers'
TrainingArguments, also by the names of older versions. `--flag value`, `--flag=value`, `-` and `_` are alike. A flag
that is given takes the place of the recipe's; given twice, the last one counts. It runs from any folder; relative paths
are those of the folder where it was called.

  --data_path FILE…           training records (JSON); needed
  --image_folder FOLDER       what the records' image paths start from; needed
  --model_name_or_path PATH   weights to start from, folder or hub id; needed, or --model_config for a new model
  --vision_tower PATH         CLIP tower, folder or hub id, where the weights do not hold it
  --dino_weights PATH         DINOv2 tower, .pth or folder, where the weights do not hold it
  --output_dir FOLDER         where checkpoints and the result go
  --resume auto               goes on from the newest checkpoint in --output_dir

Environment:
  NUM_GPUS=8                  processes on each machine, one a GPU (with DEVICE=cpu the default is 1)
  GLOBAL_BATCH=128            samples an optimizer step. --gradient_accumulation_steps is computed from it; a batch that
                              cannot be made exactly is refused. Who gives --gradient_accumulation_steps but no
                              GLOBAL_BATCH gets the batch that follows from it; both must agree.
  ZERO=3                      2 or 3: DeepSpeed's ZeRO stage by scripts/zero<stage>.json; 0: without DeepSpeed.
                              --deepspeed FILE takes another configuration.
  DEVICE=cuda                 cpu: processes on the CPU, without bf16 and tf32 unless they are asked for
  NNODES=1 NODE_RANK=0        machines, and the number of this one. Run the script on each; MASTER_ADDR (the first
  MASTER_ADDR MASTER_PORT     machine; needed) and MASTER_PORT (default 29500) are the same everywhere. See
                              scripts/finetune_slurm.sh for Slurm.
  HOSTFILE=FILE               several machines from one: lines '<host> slots=<GPUs>', started by DeepSpeed over ssh, in
                              the place of NUM_GPUS and NNODES; needs pdsh
  DRY_RUN=1                   prints the batch and the launch line, and starts nothing; looks at no file and no GPU
  PYTHON=…                    interpreter; default: .venv/bin/python of this repository, else python

The recipe:
HELP
    printf '  %s %s\n' "${flags[@]}"
    cat <<'HELP'

Examples:
  NUM_GPUS=1 bash scripts/finetune_task_lora.sh …                              one GPU, the same global batch
  NUM_GPUS=4 GLOBAL_BATCH=64 bash scripts/finetune_task_lora.sh …              another global batch
  DEVICE=cpu NUM_GPUS=2 ZERO=2 bash scripts/finetune_task_lora.sh … --max_steps 10
  DRY_RUN=1 NNODES=2 bash scripts/finetune_task_lora.sh …                      what two machines of 8 would run
HELP
}

# --- in order --------------------------------------------------------------------------------------------------------

for word in "$@"; do
    if [[ $word == --help || $word == -h ]]; then
        zero=3 per_device=8 accumulation=2 device=cuda
        recipe
        show_help
        exit 0
    fi
done
read_flags "$@"
if is_on use_cpu || is_on no_cuda; then device=cpu; fi
[[ $device == cuda || $device == cpu ]] || fail "DEVICE must be cuda or cpu, not '$device'"
[[ $dry_run == 0 || $dry_run == 1 ]] || fail "DRY_RUN must be 0 or 1, not '$dry_run'"
zero=${ZERO:-3}
[[ $zero == [023] ]] || fail "ZERO must be 2, 3 or 0, not '$zero'"
[[ -z ${ZERO:-} ]] || ! is_given deepspeed || fail "ZERO and --deepspeed both choose a configuration; leave one of them out"
num_gpus=${NUM_GPUS:-$([[ $device == cpu ]] && echo 1 || echo 8)}
for name in data_path image_folder; do
    [[ -n $(value "$name") ]] || fail "--$name is needed; --help explains"
done
[[ -n $(value model_name_or_path model_config) ]] || fail "--model_name_or_path is needed; --help explains"
count_processes
plan_batch
collect_flags
if [[ $dry_run == 0 ]]; then
    check_files
    check_machine
fi
build_launch
echo "batch: $per_device per device x $accumulation accumulation x $processes processes = $global_batch global"
if [[ $dry_run == 1 ]]; then
    printf '%q ' "${launch[@]}"
    echo
    exit 0
fi
exec "${launch[@]}"
