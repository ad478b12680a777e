"""The colours that captions name, in sRGB. Imports no JAX, as options are checked by them."""

COLOURS = {
    "red": (218, 32, 38),
    "orange": (247, 133, 18),
    "yellow": (250, 216, 40),
    "green": (36, 152, 62),
    "cyan": (54, 200, 212),
    "blue": (38, 76, 208),
    "purple": (128, 46, 160),
    "pink": (246, 134, 188),
    "brown": (122, 70, 36),
    "white": (250, 250, 250),
    "black": (16, 16, 20),
    "gray": (150, 150, 154),
}
BACKGROUNDS = {
    **{name: COLOURS[name] for name in ("white", "black", "gray")},
    "beige": (236, 222, 190),
    "navy": (22, 32, 74),
}
