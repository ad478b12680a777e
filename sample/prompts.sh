#!/bin/sh
# Every line of prompts.jsonl, and all pictures on one sheet: sh sample/prompts.sh
set -eu
python -m fluxjax.sample --prompts "$(dirname "$0")/prompts.jsonl" --grid --out out/prompts
