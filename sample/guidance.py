"""One prompt, one seed, many guidances: python sample/guidance.py

The prompt is encoded once. Guidance is data, so only the first run compiles.
"""

from PIL import Image

import fluxjax
from fluxjax.picture_sheet import picture_sheet
from fluxjax.sample.pictures import to_bytes

pipe = fluxjax.load_pipeline("tiny")
conditioning = pipe.encode_prompt("three small green stars on a navy background")
noise = pipe.draw_noise(pipe.defaults, seeds=3)
pictures = []
for guidance in (1.0, 2.0, 3.5, 5.0):
    latents = pipe.denoise(conditioning, noise, guidance=guidance)
    pictures += list(to_bytes(pipe.decode(latents)))
Image.fromarray(picture_sheet(pictures)).save("guidance.png")
