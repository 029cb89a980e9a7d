#!/usr/bin/env bash
# ShapeNet 64×64×64 as in You et al., NeurIPS 2023: the preset, the paper's prior, coverage and MMD of the samples.
#   bash examples/paper/shapenet.sh SHAPES RUN s|l [further flags of `mnif fit`, such as --dry_run]
# SHAPES is IM-NET's all_vox256_img_train.hdf5 with its .txt beside it. A fifth of its designs is kept for the test, as
# many as the paper has; which ones differs from the paper. Stopped, the same line goes on. Hours: docs/paper.md.
set -euo pipefail
data=$1 run=$2 size=$3
shift 3

${LAUNCH:-} mnif fit --preset "shapenet-$size" --data "$data" --output_dir "$run" --held_out_fraction 0 --test_fraction 0.2 "$@"
[[ " $* " == *" --dry_run "* ]] && exit
${LAUNCH:-} mnif prior --run "$run" --preset paper
${LAUNCH:-} mnif eval --model "$run/model" --reference "$data" --preset paper --num_inference_steps 1000 --num_samples 8762 \
    --output_dir "$run/eval"
