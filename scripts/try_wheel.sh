#!/usr/bin/env bash
# Installs a wheel into a fresh environment outside the repository, and goes the whole way with it on built-in data.
set -euo pipefail
wheel=$(realpath "$1")
constraints=$(realpath "$(dirname "$0")/../constraints.txt")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install --quiet --constraint "$constraints" "$wheel"
venv/bin/python -m pip check

mnif="venv/bin/mnif"
$mnif fit --data furniture --output_dir run --max_train_steps 20
$mnif prior --run run --max_train_steps 20
$mnif distill --run run --max_train_steps 5 --matching_steps 5 --num_pairs 64
$mnif sample --model run/model --num_samples 4 --output_dir samples
$mnif decode --model run/model --latents run/latents.safetensors --num 2 --output_dir decoded
$mnif export --model run/model --output_dir bundle
venv/bin/python bundle/device/verify.py
$mnif report --run run
echo "$(basename "$wheel"): installed alone, it fits, samples, exports and reports"
