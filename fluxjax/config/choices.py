"""How a network is run, by name: what options offer and modules take."""

from typing import Literal

Implementation = Literal["auto", "xla", "cudnn", "splash", "chunked"]
"""Of attention on one device."""
SequenceAttention = Literal["auto", "ulysses", "ring", "ulysses=2", "ulysses=4", "ulysses=8"]
"""Of attention over tokens that are split over devices; `ulysses=4` is ulysses among four
neighbours, and a ring of such groups."""
ComparedNetwork = Literal[
    "transformer",
    "unet",
    "vae",
    "text_encoder",
    "text_encoder_2",
    "controlnet",
    "siglip",
    "image_embedder",
    "image_encoder",
    "ip_adapter",
]
"""What is compared with PyTorch layer by layer."""
TOLD_SIZES = ("original_size", "crop", "target_size")
TOLD_PAIRS = (*TOLD_SIZES, *(f"negative_{name}" for name in TOLD_SIZES))
"""What Stable Diffusion XL is told of a picture's sizes, in settings."""
Remat = Literal["none", "dots", "full"]
"""What the backward pass computes again of each block."""
Products = Literal["float32", "bfloat16"]
"""Of what float32 products of matrices are computed in training."""
FileFamily = Literal[
    "flux", "sd", "sd2", "sd2-v", "sdxl", "sd3", "hunyuan-video", "hunyuan-video-i2v"
]
"""Whose files these are, where neither names nor shapes tell it."""
FAMILY_NAMES: dict[FileFamily, str] = {
    "flux": "FLUX.1",
    "sd": "Stable Diffusion",
    "sd2": "Stable Diffusion 2 of 512 pixels",
    "sd2-v": "Stable Diffusion 2 of 768 pixels",
    "sdxl": "Stable Diffusion XL",
    "sd3": "Stable Diffusion 3",
    "hunyuan-video": "HunyuanVideo text to video",
    "hunyuan-video-i2v": "HunyuanVideo image to video",
}
"""As sentences have them, and as `infer_config` takes them."""
LoraNaming = Literal["peft", "kohya", "comfy"]
"""Whose names a LoRA file is written in."""
MAX_STEPS = 1000
MAX_FRAMES = 4097
MAX_FPS = 240
Spacing = Literal["leading", "linspace", "trailing"]
"""How the timesteps of a run are spaced."""
Respacing = Literal["plain", "karras", "exponential", "beta", "lu"]
"""How the noise levels of a run are spaced."""
CONTROLS = ("control", "control_2", "control_3")
"""What the control pictures of several ControlNets are called, in their order."""
IP_IMAGES = ("ip_image", "ip_image_2", "ip_image_3")
"""What the pictures of an IP-Adapter are called."""
CONTROL_MODES: dict[str, int] = {
    "canny": 0,
    "tile": 1,
    "depth": 2,
    "blur": 3,
    "pose": 4,
    "gray": 5,
    "low-quality": 6,
}
"""The modes that InstantX and Shakker trained, of ten."""
