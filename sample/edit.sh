#!/bin/sh
# Draw a picture, then have it edited. The embedded model knows its drawn scenes; of anything else:
# MODEL=FLUX.1-Kontext-dev sh sample/edit.sh
set -eu
model=${MODEL:-tiny}
python -m fluxjax.sample "a red circle left of a blue star" --model "$model" --seed 7 --out out/edit/before.png
python -m fluxjax.sample "make the circle green" --model "$model" --reference out/edit/before.png --seed 7 --out out/edit/after.png
