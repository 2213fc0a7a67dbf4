#!/usr/bin/env bash
# In a fresh clone, in a fresh folder: `make train` sets itself up, trains, and shows what the README says it shows.
# With arguments, other targets instead: tests/clone.sh train test
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
git clone -q "$(dirname "$0")/.." "$folder/exp"
cd "$folder/exp"
for target in "${@:-train}"; do
  make "$target" 2>&1 | tee "$folder/log"
  if [ "$target" = train ]; then
    grep -q '^epoch  train_loss  valid_loss  accuracy  seconds$' "$folder/log"
    test "$(grep -cE '^ +[0-9]+ +[0-9.]+ +[0-9.]+ +0\.[0-9]+ +[0-9.]+$' "$folder/log")" = 2
    grep -qE '^test accuracy: 9[89]\.' "$folder/log"
    run=$(sed -n 's/^run: //p' "$folder/log")
    for file in config.json metrics.csv model.safetensors curves.png mistakes.png log.txt results.json; do test -s "$run/$file"; done
    .venv/bin/exp_runs | grep -q "^$(basename "$run") .* 2/2 "
    echo 'a fresh clone trains, shows its table and its accuracy, and leaves its run in a folder'
  fi
done
test -z "$(git status --porcelain)"
