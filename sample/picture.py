"""From a prompt to a picture: python sample/picture.py"""

import fluxjax

pipe = fluxjax.load_pipeline("tiny")
(picture,) = pipe("a red circle left of a blue star", seed=7)
picture.save("circle-and-star.png")
