#!/usr/bin/env bash
# Run every step once on a small data set: images -> shards -> training -> kNN accuracy, pictures, exported backbone.
#
#   tools/quickstart.sh                       with a generated demo set; minutes on two CPU cores
#   tools/quickstart.sh --images DIR          with your own photographs (configs/photos.yaml), about half an hour on
#                                             two cores; subfolders of DIR are classes
#
#   --out DIR       folder for all results (default: quickstart; quickstart/own with --images)
#   --ranks N       training processes, one per GPU if there are GPUs (default: 1)
#   a.b=value ...   further settings of the training, such as run.steps=200 for a shorter one
#
# Needs Python >= 3.10. Run it again to resume where it stopped; finished steps are skipped. Other settings train in
# a run directory of their own. tools/setup_env.sh --help lists the variables of the installation.
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
        run.dir=* | data.shards=*) misused "${1%%=*} is set by this script, below --out" ;;
        *=*) overrides+=("$1"); shift ;;
        *) misused "unknown argument $1" ;;
    esac
done
[[ $ranks =~ ^[1-9][0-9]*$ ]] || misused "--ranks $ranks is not a number of processes"
[ -z "$images" ] || [ -d "$images" ] || misused "--images $images is not a folder"
if [ -z "$out" ]; then out=quickstart${images:+/own}; fi
recipe=${images:+photos.yaml} recipe=${recipe:-quickstart.yaml}
mkdir -p "$out/logs" "$out/done" || fail "cannot write to $out"

# stage NAME KEY COMMAND ...: run the command and copy its output to a log. A command that has succeeded with the same
# non-empty KEY is skipped.
names=() times=()
stage() {
    local name=$1 key=$2 begun=$SECONDS status=0
    local log=$out/logs/$name.log mark=$out/done/$name
    shift 2
    if [ -n "$key" ] && [ "$(cat "$mark" 2>/dev/null)" = "$key" ]; then
        printf '\n== %s: already done\n' "$name"
        names+=("$name") times+=("earlier")
        return
    fi
    printf '\n== %s\n' "$name"
    "$@" 2>&1 | tee -i "$log" || status=${PIPESTATUS[0]}
    if [ "$status" -eq 75 ]; then
        printf 'stopped after a checkpoint; run the same command again to resume\n' >&2
        exit 75
    elif [ "$status" -ne 0 ]; then
        fail "stage '$name' failed (exit $status); its output is in $log"
    fi
    printf '%s\n' "$key" >"$mark"
    names+=("$name") times+=("$((SECONDS - begun)) s")
    printf '   %s\n' "${times[-1]}"
}
trap 'printf "\ninterrupted; run the same command again to resume\n" >&2; exit 130' INT TERM

printf '== set-up\n'
tools/setup_env.sh hf
export PATH="$PWD/.venv/bin:$PATH"
names+=("set-up") times+=("$((SECONDS - started)) s")
work_started=$SECONDS

# Both commands skip finished work themselves. Another version of the demo set has other images, so it gets another folder.
set_dir=$out/shards
if [ -z "$images" ]; then
    version=$(sed -n 's/^VERSION = //p' tools/make_demo_images.py)
    images=$out/images-v$version labels=$out/labels-v$version set_dir=$out/mapped-v$version
    stage images "" python tools/make_demo_images.py --out "$images" --labels "$labels"
fi
# The recipe for photographs trains with crops of 64 pixels: small images are decoded faster, at every epoch.
packing=(--max-side 256)
if [ "$recipe" = quickstart.yaml ]; then packing=(--seg "$labels/masks" --depth "$labels/depth"); fi
stage pack "" streamtrain pack --src "$images" --out "$set_dir" "${packing[@]}"

# The remaining stages depend on the images, the recipe and the overrides. A run resumes only with the settings that
# it was started with, so its directory has this key too.
key=$( (grep '"digest"' "$set_dir/manifest.json"; cat "configs/$recipe"; echo "$ranks" "${overrides[@]}") |
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
        stage "$name" "$key" streamtrain evaluate knn "$@" --train "$set_dir"
    fi
}

# Draw four images, spread over the first shard; packed images are known to be readable.
pictures() {
    local tar=$set_dir/shards/000000.tar folder=$out/pictures chosen
    mapfile -t chosen < <(tar -tf "$tar" | grep -vE '\.(cls|json|txt)$' |
        awk '{name[NR] = $0} END {n = NR < 4 ? NR : 4; for (i = 0; i < n; i++) print name[int(i * NR / n) + 1]}')
    mkdir -p "$folder/images" && tar -xf "$tar" -C "$folder/images" "${chosen[@]}" &&
        streamtrain visualize pca --run "$run" --image "${chosen[@]/#/$folder/images/}" --out "$folder/pca.png" &&
        streamtrain visualize similarity --run "$run" --image "$folder/images/${chosen[0]}" \
            --out "$folder/similarity.png"
}

export_backbone() {
    streamtrain export --run "$run" --to hf --out "$out/export/hf" &&
        streamtrain export --run "$run" --to safetensors --out "$out/export/safetensors"
}

# Time a few steps on this machine, and say how long the training takes.
duration() {
    python tools/bench.py step --config "$recipe" --data "$set_dir" --ranks "$ranks" --steps 5 --json "${overrides[@]}" |
        tail -n 1 | python -c 'import json, sys
from streamtrain.config.load import load_config
steps = load_config(sys.argv[1], sys.argv[2:]).run.steps
seconds = json.load(sys.stdin)["step_seconds"]
minutes = max(1, round(steps * seconds / 60))
print(f"{steps} steps of {seconds:.2g} s on this machine: the training takes about {minutes} min")
print("for a shorter one, press Ctrl-C and add run.steps=N to the command")' "$recipe" "${overrides[@]}"
}

knn knn-pixels --pixels
knn knn-untrained --untrained --config "$recipe"
if [ "$recipe" = photos.yaml ]; then stage duration "$key" duration; fi
stage train "$key" streamtrain train --ranks "$ranks" --config "$recipe" \
    "data.shards=$set_dir" "run.dir=$run" "${overrides[@]}"
# the second comparison takes the features of the first from the cache
knn knn-trained --run "$run" --compare untrained
knn knn-trained-pixels --run "$run" --compare pixels
stage pictures "$key" pictures
stage report "$key" streamtrain report --run "$run" --out "$out/report.html"
stage export "$key" export_backbone

printf '\n== done\n'
for i in "${!names[@]}"; do printf '   %-16s %8s\n' "${names[i]}" "${times[i]}"; done
printf '   %-16s %8s   (without set-up: %s s)\n' total "$((SECONDS - started)) s" "$((SECONDS - work_started))"
if [ -z "$no_labels" ]; then
    printf '\nAccuracy on held-out images; ± is a 95%% interval\n'
    sed -n 's/^kNN accuracy/   &/p' "$out"/logs/knn-{pixels,untrained,trained}.log
    printf 'The trained network, image by image\n'
    sed -n 's/^compared with/   &/p' "$out"/logs/knn-trained{,-pixels}.log
fi
# of the evaluations while training
python -c 'import json, sys
from pathlib import Path
run = Path(sys.argv[1])
try:
    start = json.loads((run / "baselines.json").read_text())["start"]
    lines = (run / "metrics.jsonl").read_text().splitlines()
    last = next(record for record in map(json.loads, reversed(lines)) if "eval/depth_rmse" in record)
    rows = [(f"mIoU of {name}", f"eval/segmentation_{key}_miou", "6.1%") for name, key in
            (("patch kNN", "knn"), ("linear layer", "linear"))]
    rows += [("depth RMSE in m", "eval/depth_rmse", "6.3f"), ("depth within 1.25", "eval/depth_delta1", "6.1%")]
    table = [f"   {name:21} {start[tag]:{form}}    {last[tag]:{form}}" for name, tag, form in rows]
    step = last["step"]
    print("\n".join(["Patch features on held-out images, untrained and at step {}".format(step), *table]))
except (OSError, ValueError, KeyError, StopIteration):
    pass' "$run"
cat <<EOF

Results
   pictures      $out/pictures/pca.png, $out/pictures/similarity.png
   report        $out/report.html (verdict, curves with baselines, feature maps, settings)
   run           $run (metrics.jsonl, checkpoints/, tensorboard/)
   backbone      $out/export/hf (for transformers), $out/export/safetensors

Next (after: source .venv/bin/activate)
   view curves and crops             tensorboard --logdir $run
   the same with your images         tools/quickstart.sh --images DIR
   pack, then train in earnest       streamtrain pack --src DIR --out SET
                                     streamtrain train --config vits16.yaml data.shards=SET run.dir=RUN
EOF
