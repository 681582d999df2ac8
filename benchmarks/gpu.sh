#!/usr/bin/env bash
# All benchmarks that need a GPU, on one of 80 GB, in under nine minutes: a part is cut off when its time is up, and left
# out when all is. Never run on a GPU yet.
#
#     bash benchmarks/gpu.sh
#
# To see that every part runs, on a CPU in a few minutes:
#
#     bash benchmarks/gpu.sh --shape tiny --device cpu --dtype float32 --output_dir runs/gpu_rehearsal
#
# Writes a text file for each part, and summary.txt, into benchmarks/results/NAME-OF-THE-GPU. Needs no network: without
# peft, datasets and the rest it installs wheels from ./wheels. Get those on a machine with a network and this Python:
#
#     pip download --only-binary :all: --dest wheels "transformers>=5.16,<5.24" accelerate peft datasets matplotlib \
#         huggingface_hub rich tqdm
#
# Another interpreter: PYTHON=python3.12 bash benchmarks/gpu.sh
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3} shapes="4B 8B" device=cuda dtype=bfloat16 output=""
while [ $# -gt 0 ]; do
    case $1 in
        --shape) shapes=$2 ;;
        --device) device=$2 ;;
        --dtype) dtype=$2 ;;
        --output_dir) output=$2 ;;
        *) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 2 ;;
    esac
    shift 2
done
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

if ! "$python" -c "import accelerate, datasets, matplotlib, peft, rich, tqdm, transformers" 2> /dev/null; then
    "$python" -m pip install --quiet --no-index --find-links wheels "transformers>=5.16" accelerate peft datasets \
        matplotlib rich tqdm || exit 1
fi
if [ -z "$output" ]; then
    name=$("$python" -c "import re, torch; print(re.sub('[^a-z0-9]+', '-', torch.cuda.get_device_name().lower()))") \
        || exit 1
    output=benchmarks/results/$name
fi
mkdir -p "$output"
: > "$output/summary.txt"
failed=0

if [ "$shapes" = tiny ]; then budget=86400 patience=100; else budget=530 patience=1; fi

# part FILE SECONDS MODULE ARGUMENT...: run a benchmark, append what it prints to FILE.txt, note how it went.
part() {
    local file=$1 limit=$(($2 * patience)) module=$3 start=$SECONDS status note
    shift 3
    [ $limit -le $((budget - SECONDS)) ] || limit=$((budget - SECONDS))
    if [ $limit -lt 10 ]; then
        echo "0 s  $module $*  LEFT OUT, the time is up" | tee -a "$output/summary.txt"
        failed=1
        return
    fi
    echo "\$ python -m benchmarks.$module $*" >> "$output/$file.txt"
    timeout "$limit" "$python" -m "benchmarks.$module" "$@" 2> "$output/stderr.tmp" | tee -a "$output/$file.txt"
    status=${PIPESTATUS[0]}
    case $status in
        0) note="" ;;
        124) note="  CUT OFF after $limit s" ;;
        *) note="  FAILED: $(tail -n 1 "$output/stderr.tmp")" ;;
    esac
    [ "$status" = 0 ] || failed=1
    echo "$((SECONDS - start)) s  $module $*$note" | tee -a "$output/summary.txt"
}

if [ "$device" = cuda ]; then
    nvidia-smi --query-gpu=name,driver_version,memory.total,power.limit --format=csv | tee -a "$output/summary.txt"
fi
rm -f "$output"/{parity,generation,training,decode,prefill,image_kv_cache,memory}.txt
if [ "$shapes" = tiny ]; then
    visual=64 long=128 steps="--steps 4" runs="--runs 2" tokens="--new_tokens 8" batches="1 2"
else
    visual=1024 long=16384 steps="--steps 24" runs="--runs 3" tokens="--new_tokens 32" batches="1 8"
fi

# In the order of what would be missed most.
part parity 60 parity --device "$device"
compile=--compile
for shape in $shapes; do
    common=(--shape "$shape" --device "$device" --dtype "$dtype")
    part generation 150 generation "${common[@]}" --visual_tokens $visual $tokens $runs $compile
    compile=""  # takes a minute, and once is enough
    # AdamW's state of all of 8B does not fit beside the other models.
    methods="PVM LoRA full"
    [ "$shape" = 8B ] && methods="PVM LoRA"
    part training 60 training "${common[@]}" --visual_tokens $visual --text_tokens $visual $steps --methods $methods
    part decode 60 decode "${common[@]}" --visual_tokens $visual $long --batch_sizes $batches $steps
    part prefill 40 prefill "${common[@]}" --visual_tokens $visual $long $runs
    part image_kv_cache 60 image_kv_cache "${common[@]}" --visual_tokens $visual $long --prompts $visual $long \
        --batch_sizes $batches $steps
    if "$python" -c "import sys, pvm, transformers.utils as u; sys.exit(not u.is_flash_attn_2_available())"; then
        flash=("${common[@]}" --attn_implementation flash_attention_2)
        part generation 60 generation "${flash[@]}" --visual_tokens $visual $tokens $runs
        part prefill 40 prefill "${flash[@]}" --visual_tokens $visual $long $runs
    else
        echo "0 s  flash_attention_2 at $shape: LEFT OUT, it needs a GPU and the package flash-attn" \
            | tee -a "$output/summary.txt"
    fi
done
part memory 40 memory --shape "${shapes%% *}" --device "$device" --dtype "$dtype" --visual_tokens $visual $long
rm -f "$output/stderr.tmp"
echo "$SECONDS s in all. Written: $output" | tee -a "$output/summary.txt"
exit $failed
