#!/usr/bin/env bash
# The embedded network at three budgets, and the best static mix for one of them: convert, look at what was decided, evaluate.
# A few minutes on two cores.
#   bash examples/quickstart.sh [FOLDER [OPTIONS OF dfs convert]]
set -euo pipefail
folder=${1:-quickstart}
shift || true
mkdir -p "$folder"

try() {
    local name=$1
    shift
    dfs convert resnet20_digits "$@" --output "$folder/$name.safetensors" --force
    dfs profile "$folder/$name.safetensors" --plot "$folder/$name.png" --force
    dfs eval "$folder/$name.safetensors" --results-file "$folder/$name.csv" --force
}

for budget in 0.05 0.02 0.01; do
    try "budget_$budget" --budget "$budget" "$@"
done
try static_0.02 --budget 0.02 --gate static "$@"
