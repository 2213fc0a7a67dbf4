#!/usr/bin/env bash
# The same tree with nbdev 3: in an environment of its own it exports the modules, and they are the same bytes.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install -qq --disable-pip-version-check 'nbdev>=3.3,<4'
cp -r "$root/nbs" "$root/exp" "$root/settings.ini" "$root/pyproject.toml" "$folder"
rm "$folder"/exp/nb_*.py
cd "$folder"
env/bin/nbdev-export
for file in exp/nb_*.py; do cmp "$file" "$root/$file"; done
test "$(ls exp/nb_*.py | wc -l)" = "$(ls "$root"/exp/nb_*.py | wc -l)"
cmp pyproject.toml "$root/pyproject.toml"
echo "nbdev $(env/bin/python -c 'import nbdev; print(nbdev.__version__)') exports the same $(ls exp/nb_*.py | wc -l) modules, byte for byte"
