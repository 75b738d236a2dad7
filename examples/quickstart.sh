#!/usr/bin/env bash
# The embedded network at three budgets: convert, look at what it decided, evaluate. About two minutes on two cores.
#   bash examples/quickstart.sh [FOLDER]
set -euo pipefail
folder=${1:-quickstart}
mkdir -p "$folder"
for budget in 0.4 0.1 0.02; do
    dfs convert resnet20_digits --budget "$budget" --output "$folder/digits_$budget.safetensors" --force
    dfs profile "$folder/digits_$budget.safetensors" --plot "$folder/digits_$budget.png" --force
    dfs eval "$folder/digits_$budget.safetensors" --results-file "$folder/digits_$budget.csv" --force
done
