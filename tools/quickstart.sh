#!/usr/bin/env bash
# Everything once, small and real: images -> shards -> training -> kNN accuracy, pictures, exported backbone.
#
#   tools/quickstart.sh                       with a drawn demo set; minutes on two CPU cores
#   tools/quickstart.sh --images DIR          with your own images; subfolders of DIR are classes
#
#   --out DIR       where everything goes (default: quickstart; quickstart/own with --images)
#   --ranks N       training processes, one a GPU where there are any (default: 1)
#   a.b=value ...   further arguments go to the training, e.g. run.steps=1000
#
# Needs Python >= 3.10. Running it again goes on where it was and repeats nothing finished; with other settings it trains
# anew, in a run folder of its own. tools/setup_env.sh tells the variables that the installation heeds.
set -euo pipefail
started=$SECONDS
caller=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { printf 'error: %s\n' "$*" >&2; exit 1; }
misused() { printf 'error: %s; see %s --help\n' "$*" "$0" >&2; exit 2; }

images='' out='' ranks=1 overrides=()
absolute() { case "$1" in /*) printf '%s\n' "$1" ;; *) printf '%s\n' "$caller/$1" ;; esac; }
while [ $# -gt 0 ]; do
    case "$1" in
        --help | -h) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"; exit ;;
        --images | --out | --ranks)
            [ -n "${2:-}" ] || misused "$1 needs a value"
            case "$1" in
                --images) images=$(absolute "$2") ;;
                --out) out=$(absolute "$2") ;;
                --ranks) ranks=$2 ;;
            esac
            shift 2
            ;;
        run.dir=* | data.shards=*) misused "${1%%=*} is chosen here, below --out" ;;
        *=*) overrides+=("$1"); shift ;;
        *) misused "unknown argument $1" ;;
    esac
done
[[ $ranks =~ ^[1-9][0-9]*$ ]] || misused "--ranks $ranks is not a number of processes"
[ -z "$images" ] || [ -d "$images" ] || misused "--images $images is not a folder"
if [ -z "$out" ]; then out=quickstart${images:+/own}; fi
mkdir -p "$out/logs" "$out/done" || fail "cannot write to $out"

# stage NAME KEY COMMAND ...: runs the command, once for each KEY that is not empty; its output goes to the terminal
# and to a log.
names=() times=()
stage() {
    local name=$1 key=$2 begun=$SECONDS status=0
    local log=$out/logs/$name.log mark=$out/done/$name
    shift 2
    if [ -n "$key" ] && [ "$(cat "$mark" 2>/dev/null)" = "$key" ]; then
        printf '\n== %s: done before\n' "$name"
        names+=("$name") times+=("before")
        return
    fi
    printf '\n== %s\n' "$name"
    "$@" 2>&1 | tee -i "$log" || status=${PIPESTATUS[0]}
    if [ "$status" -eq 75 ]; then
        printf 'stopped after a checkpoint; the same command goes on from there\n' >&2
        exit 75
    elif [ "$status" -ne 0 ]; then
        fail "stage '$name' failed (exit $status); its output is in $log"
    fi
    printf '%s\n' "$key" >"$mark"
    names+=("$name") times+=("$((SECONDS - begun)) s")
    printf '   %s\n' "${times[-1]}"
}
trap 'printf "\ninterrupted; the same command goes on from here\n" >&2; exit 130' INT TERM

printf '== set-up\n'
tools/setup_env.sh hf
export PATH="$PWD/.venv/bin:$PATH"
names+=("set-up") times+=("$((SECONDS - started)) s")
work_started=$SECONDS

# Both find by themselves what they finished before. Another version draws other images, which must not mix with those.
set_dir=$out/shards
if [ -z "$images" ]; then
    version=$(sed -n 's/^VERSION = //p' tools/make_demo_images.py)
    images=$out/images-v$version set_dir=$out/shards-v$version
    stage images "" python tools/make_demo_images.py --out "$images"
fi
stage pack "" python tools/make_shards.py --src "$images" --out "$set_dir"

# What is left depends on the images, the recipe and the overrides; so does the run, which can only be gone on with as
# it was begun.
key=$( (grep '"digest"' "$set_dir/manifest.json"; cat configs/quickstart.yaml; echo "$ranks" "${overrides[@]}") |
    cksum | cut -d ' ' -f 1)
run=$out/run-$key
no_labels=$(python -c 'import sys
from pathlib import Path
from streamtrain.evaluation.images import open_images
try:
    if len(set(open_images(Path(sys.argv[1])).labels)) < 2: print("all images have the same label")
except ValueError as error: print(error)' "$set_dir")
knn() {
    local name=$1
    shift
    if [ -n "$no_labels" ]; then
        printf '\n== %s: skipped: %s\n' "$name" "$no_labels"
    else
        stage "$name" "$key" python tools/evaluate.py knn "$@" --train "$set_dir" --json
    fi
}

# Of the packed images, since those are known to be readable: four, spread over the first shard.
pictures() {
    local tar=$set_dir/shards/000000.tar folder=$out/pictures chosen
    mapfile -t chosen < <(tar -tf "$tar" | grep -vE '\.(cls|json|txt)$' |
        awk '{name[NR] = $0} END {n = NR < 4 ? NR : 4; for (i = 0; i < n; i++) print name[int(i * NR / n) + 1]}')
    mkdir -p "$folder/images" && tar -xf "$tar" -C "$folder/images" "${chosen[@]}" &&
        python tools/visualize.py pca --run "$run" --image "${chosen[@]/#/$folder/images/}" --out "$folder/pca.png" &&
        python tools/visualize.py similarity --run "$run" --image "$folder/images/${chosen[0]}" \
            --out "$folder/similarity.png"
}

export_backbone() {
    python tools/export.py --run "$run" --to hf --out "$out/export/hf" &&
        python tools/export.py --run "$run" --to safetensors --out "$out/export/safetensors"
}

knn knn-pixels --pixels
knn knn-untrained --untrained --config quickstart.yaml
stage train "$key" deepspeed --num_gpus "$ranks" streamtrain/main.py --config quickstart.yaml \
    "data.shards=$set_dir" "run.dir=$run" "${overrides[@]}"
knn knn-trained --run "$run"
stage pictures "$key" pictures
stage report "$key" python tools/report.py --run "$run" --out "$out/report.html"
stage export "$key" export_backbone

printf '\n== done\n'
for i in "${!names[@]}"; do printf '   %-16s %8s\n' "${names[i]}" "${times[i]}"; done
printf '   %-16s %8s   (without set-up: %s s)\n' total "$((SECONDS - started)) s" "$((SECONDS - work_started))"
if [ -z "$no_labels" ]; then
    printf '\nkNN accuracy (k = 10) on a fifth of the images, the others being the neighbours\n'
    for what in pixels untrained trained; do
        printf '   %-16s %8s\n' "$what" "$(tail -n 1 "$out/logs/knn-$what.log" |
            python -c 'import json, sys; print(format(json.load(sys.stdin)["knn_10"], ".1%"))')"
    done
fi
cat <<EOF

Where things are
   pictures      $out/pictures/pca.png, $out/pictures/similarity.png
   report        $out/report.html (curves, the network's maps before and after training, settings)
   run           $run (metrics.jsonl, checkpoints/, tensorboard/)
   backbone      $out/export/hf (for transformers), $out/export/safetensors

Next
   see the curves and the crops     .venv/bin/tensorboard --logdir $run
   the same with your images        tools/quickstart.sh --images DIR
   a real run: pack, then train     .venv/bin/python tools/make_shards.py --src DIR --out SET
                                    .venv/bin/deepspeed streamtrain/main.py --config vits16.yaml data.shards=SET run.dir=RUN
EOF
