#!/usr/bin/env bash
# CelebA-HQ 64×64 as in You et al., NeurIPS 2023: the preset, the paper's prior, FID under the paper's protocol.
#   bash examples/paper/celeba_hq.sh PICTURES RUN s|l [further flags of `mnif fit`, such as --dry_run]
# PICTURES is a folder of the training pictures. Stopped, the same line goes on. Figures and hours: docs/paper.md.
set -euo pipefail
data=$1 run=$2 size=$3
shift 3
all=(--held_out_fraction 0 --test_fraction 0) # the paper measures against what it learned from

${LAUNCH:-} mnif fit --preset "celeba-hq-$size" --data "$data" --output_dir "$run" "${all[@]}" "$@"
[[ " $* " == *" --dry_run "* ]] && exit
${LAUNCH:-} mnif prior --run "$run" --preset paper
${LAUNCH:-} mnif eval --model "$run/model" --reference "$data" --preset paper --num_inference_steps 1000 \
    "${all[@]}" --output_dir "$run/eval"
mnif report --run "$run"
