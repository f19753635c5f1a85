#!/usr/bin/env bash
# The gate on our own numbers: one method on a small synthetic dataset against ci/btf-fpfh.json. Ends as `mmad report`
# does: 0 within tolerance, 1 when a number has moved, 3 when one is missing. What it found is in build/gate:
# summary.md, junit.xml, report.html and the run.
#
# Everything is computed anew, so that no stored result hides a change. GATE_STORE=FOLDER keeps the store there and
# uses what it holds; it must be filled by the same code, as the cache of .github/workflows/ci.yml is.
#
# After a change that is meant to move numbers: ci/gate.sh --update, look at what moved, commit ci/btf-fpfh.json.
set -euo pipefail
cd "$(dirname "$0")/.."
mmad=${MMAD:-.venv/bin/mmad}
folder=build/gate
reference=ci/btf-fpfh.json

rm -rf "$folder"
export MMAD_STORE=${GATE_STORE:-$folder/store}
"$mmad" synth "$folder/data" --category flange --category hose \
    --train 6 --validation 1 --test-good 5 --test-defect 1 --size 160 --seed 0
"$mmad" evaluate "$folder/data" --method btf --variant fpfh --device cpu --save-maps --score-validation \
    --out "$folder/run" >/dev/null

if [ "${1:-}" = --update ]; then
    exec "$mmad" report "$folder/run" --update-reference "$reference" --output "$folder/summary.md" --format markdown
fi

compare() {
    "$mmad" report "$folder/run" --against "$reference" --config ci/mmad.toml "$@"
}
code=0
compare --format markdown --output "$folder/summary.md" || code=$?
for format in "junit --output $folder/junit.xml" "html --output $folder/report.html --data $folder/data"; do
    again=0
    # shellcheck disable=SC2086 # the options are words of their own
    compare --format $format || again=$?
    [ "$again" = "$code" ] || exit "$again"
done
if [ "$code" = 0 ]; then
    compare --metric i_auroc --metric p_auroc --metric aupro_30
else
    compare || true
fi
exit "$code"
