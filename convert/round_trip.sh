#!/usr/bin/env bash
# A diffusers pipeline to BFL's files, to Orbax and back: what returns is what left.
# usage: round_trip.sh [MODEL_FOLDER [WORK_FOLDER]]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
model=${1:-$here/../fluxjax/assets/tiny}
work=${2:-$(mktemp -d)}

python -m fluxjax.convert "$model" "$work/bfl" --to bfl
# Laid out for eight devices, and read here without any of them.
python -m fluxjax.convert "$work/bfl" "$work/orbax" --to orbax --mesh fsdp=4,tensor=2
python -m fluxjax.convert "$work/orbax" "$work/diffusers" --to diffusers
python "$here/tensors.py" "$model" "$work/diffusers"
