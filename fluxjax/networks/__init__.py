"""One description per kind of weights. The order is that in which names are tried."""

from fluxjax.config import (
    AutoencoderConfig,
    CausalAutoencoderConfig,
    CLIPConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    ControlNetConfig,
    DCAutoencoderConfig,
    FluxConfig,
    HunyuanVideoConfig,
    IPAdapterConfig,
    LlamaConfig,
    LlavaConfig,
    OpenSoraConfig,
    PixArtConfig,
    ReduxConfig,
    SD3Config,
    SiglipVisionConfig,
    T5Config,
    UNetConfig,
)
from fluxjax.networks.autoencoder import AUTOENCODER
from fluxjax.networks.causal_autoencoder import CAUSAL_AUTOENCODER
from fluxjax.networks.clip import CLIP, CLIP_TEXT, CLIP_VISION
from fluxjax.networks.controlnet import CONTROLNET
from fluxjax.networks.dc_autoencoder import DC_AUTOENCODER
from fluxjax.networks.flux import FLUX
from fluxjax.networks.hunyuan_video import HUNYUAN_VIDEO
from fluxjax.networks.ip_adapter import IP_ADAPTER
from fluxjax.networks.llama import LLAMA
from fluxjax.networks.llava import LLAVA
from fluxjax.networks.network import Network
from fluxjax.networks.open_sora import OPEN_SORA
from fluxjax.networks.pixart import PIXART
from fluxjax.networks.redux import REDUX
from fluxjax.networks.sd3 import SD3
from fluxjax.networks.siglip import SIGLIP
from fluxjax.networks.t5 import T5
from fluxjax.networks.unet import UNET

NETWORKS: dict[type, Network] = {
    network.config: network
    for network in (
        FLUX,
        UNET,
        SD3,
        PIXART,
        OPEN_SORA,
        HUNYUAN_VIDEO,
        AUTOENCODER,
        CLIP_TEXT,
        T5,
        CLIP_VISION,
        CLIP,
        CONTROLNET,
        SIGLIP,
        REDUX,
        IP_ADAPTER,
        CAUSAL_AUTOENCODER,
        DC_AUTOENCODER,
        LLAMA,
        LLAVA,
    )
}
Config = (
    FluxConfig
    | UNetConfig
    | SD3Config
    | PixArtConfig
    | OpenSoraConfig
    | HunyuanVideoConfig
    | AutoencoderConfig
    | CLIPTextConfig
    | T5Config
    | CLIPVisionConfig
    | CLIPConfig
    | ControlNetConfig
    | SiglipVisionConfig
    | ReduxConfig
    | IPAdapterConfig
    | CausalAutoencoderConfig
    | DCAutoencoderConfig
    | LlamaConfig
    | LlavaConfig
)


def network_of(config: object) -> Network:
    """The description of the kind of weights that `config` is of."""
    return NETWORKS[type(config)]


def by_component(component: str) -> Network:
    """The kind of weights that lies in a FLUX pipeline's folder `component`."""
    return next(network for network in NETWORKS.values() if network.component == component)
