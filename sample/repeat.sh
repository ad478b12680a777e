#!/bin/sh
# A picture carries its settings: repeat it exactly, then vary one of them: sh sample/repeat.sh
set -eu
python -m fluxjax.sample "a purple star right of an orange ring" --seed 11 --out out/repeat/first.png
python -m fluxjax.sample --like out/repeat/first.png --out out/repeat/same.png
python -m fluxjax.sample --like out/repeat/first.png --seed 12 --out out/repeat/other.png
