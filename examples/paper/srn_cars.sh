#!/usr/bin/env bash
# SRN Cars 128×128 as in You et al., NeurIPS 2023: the preset, the paper's prior, distances of rendered samples.
#   bash examples/paper/srn_cars.sh CARS RUN s [further flags of `mnif fit`, such as --dry_run]
# CARS is cars_train of Scene Representation Networks. The paper renders each sample from 251 cameras and `mnif eval`
# from eight, so the FID is another one. Stopped, the same line goes on. Hours: docs/paper.md.
set -euo pipefail
data=$1 run=$2 size=$3
shift 3

${LAUNCH:-} mnif fit --preset "srn-cars-$size" --data "$data" --output_dir "$run" "$@"
[[ " $* " == *" --dry_run "* ]] && exit
${LAUNCH:-} mnif prior --run "$run" --preset paper
${LAUNCH:-} mnif eval --model "$run/model" --reference "$data" --preset paper --num_inference_steps 1000 --output_dir "$run/eval"
