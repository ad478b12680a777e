"""Clips in tiles: the same frames in groups, memory that does not grow, tiles on many devices."""

import tracemalloc
from typing import Any, NamedTuple

import diffusers
import jax
import numpy as np
import pytest
import torch

from fluxjax.config import CausalAutoencoderConfig, ConfigError
from fluxjax.config.tiling import OPEN_SORA, TENCENT, WHOLE, Tiles, Tiling
from fluxjax.models import video_tiles
from fluxjax.models.causal_autoencoder import CausalAutoencoder
from fluxjax.models.video_tiles import decode_groups, decode_tiled, encode_tiled
from fluxjax.parallel.compiled_program import measure
from fluxjax.parallel.mesh import make_mesh
from fluxjax.parallel.tiles import EachDevice, tiles_on

SMALL = Tiles(16, 12)
BOTH = Tiling(rows=SMALL, columns=SMALL, frames=Tiles(8, 4))


class Copying(NamedTuple):
    """What an autoencoder would be whose latents are every fourth frame and eighth pixel."""

    config: CausalAutoencoderConfig

    def __call__(self, model, method, spread, params, tiles):
        if method == "encode_tile":
            return tiles[:, ::4, ::4, ::4]
        first, later = tiles[:, :1], np.repeat(tiles[:, 1:], 4, axis=1)
        clip = np.concatenate([first, later], axis=1)
        return np.repeat(np.repeat(clip, 4, axis=2), 4, axis=3) * params


@pytest.fixture
def copying(monkeypatch):
    config = CausalAutoencoderConfig(
        block_out_channels=(32, 32, 32), spatial_compression_ratio=4, latent_channels=3
    )
    model, calls = Copying(config), []

    def run(*arguments):
        calls.append(arguments[4].shape)
        return model(*arguments)

    monkeypatch.setattr(video_tiles, "_run", run)
    return model, calls


def latents(t, h, w, channels=3):
    return np.random.default_rng(0).normal(size=(2, t, h, w, channels)).astype(np.float32)


def test_tiles_of_what_needs_none_are_the_whole(copying):
    """Where tiles agree on what they share, blending changes nothing."""
    model, calls = copying
    z = latents(8, 7, 9)
    whole = decode_tiled(model, 1.0, z, WHOLE)
    assert whole.shape == (2, 29, 28, 36, 3) and calls == [z.shape]
    for together in (1, 3, 16):
        calls.clear()
        groups = list(decode_groups(model, 1.0, z, BOTH, together=together))
        # Frames begin at latents 0, 1, ... 6, each group but the first with a frame less.
        assert [group.shape[1] for group in groups] == [5, *[4] * 6]
        np.testing.assert_allclose(np.concatenate(groups, axis=1), whole, atol=1e-6)
        assert {shape[0] for shape in calls} == {2 * together}
    np.testing.assert_allclose(encode_tiled(model, 1.0, whole, BOTH), z, atol=1e-6)


def test_rows_and_columns_are_cut_where_either_is_long(copying):
    model, calls = copying
    z = latents(3, 2, 5)
    decode_tiled(model, 1.0, z, Tiling(rows=SMALL, columns=SMALL))
    assert [shape[2:4] for shape in calls] == [(2, 4), (2, 2)]
    calls.clear()
    decode_tiled(model, 1.0, z[:, :, :, :4], BOTH)
    assert [shape[1:4] for shape in calls] == [(3, 2, 4), (2, 2, 4)]


def test_a_neighbour_fades_into_a_tile(copying, monkeypatch):
    """Tiles that are worth 0, 1, 2, ... one after the other: a ramp that starts at the old."""
    model, _ = copying
    worth = iter(range(9))
    monkeypatch.setattr(
        video_tiles, "_run", lambda *given: model(*given[:4], given[4] * 0 + next(worth))
    )
    line = decode_tiled(model, 1.0, latents(1, 1, 9), Tiling(rows=SMALL, columns=SMALL))[0, 0, 0]
    expected = [0] * 12 + [0, 0.25, 0.5, 0.75] + [1] * 8 + [1, 1.25, 1.5, 1.75] + [2] * 8
    np.testing.assert_allclose(line[:, 0], expected)


@pytest.fixture(scope="module")
def published():
    """diffusers' autoencoder with small random weights."""
    torch.manual_seed(0)
    sizes = {"block_out_channels": (2, 2, 4, 4), "layers_per_block": 1, "norm_num_groups": 2}
    return diffusers.AutoencoderKLHunyuanVideo(latent_channels=2, **sizes).eval()


def own_first(x: Any) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


@pytest.mark.slow
@pytest.mark.parametrize("frames", [None, Tiles(16, 12), Tiles(64, 48)])
def test_tiles_of_any_size_are_diffusers(published, monkeypatch, frames):
    """Sides and lengths below, at and above a tile, one axis alone; its networks code them all."""

    def run(model, method, spread, params, tiles):
        x = own_first(tiles)
        if method == "encode_tile":
            x = published.quant_conv(published.encoder(x))
        else:
            x = published.decoder(published.post_quant_conv(x))
        return np.moveaxis(x.numpy(), 1, -1)

    monkeypatch.setattr(video_tiles, "_run", run)
    model = Copying(CausalAutoencoderConfig(latent_channels=2))
    rows, columns = Tiles(32, 24), Tiles(48, 32)
    tiling = Tiling(rows=rows, columns=columns, frames=frames)
    published.enable_tiling(32, 48, None, 24, 32, None)
    published.use_framewise_encoding = published.use_framewise_decoding = frames is not None
    if frames is not None:
        published.tile_sample_min_num_frames = frames.size
        published.tile_sample_stride_num_frames = frames.stride
    rng = np.random.default_rng(0)
    sizes = [(1, 24, 40), (1, 40, 48), (5, 32, 56), (13, 24, 64), (17, 40, 40), (29, 32, 56)]
    for t, h, w in [*sizes, (69, 8, 8)]:
        clip = rng.uniform(-1, 1, (1, t, h, w, 3)).astype(np.float32)
        latents = rng.normal(size=(1, (t - 1) // 4 + 1, h // 8, w // 8, 2)).astype(np.float32)
        with torch.no_grad():
            encoded = published._encode(own_first(clip))
            decoded = published.decode(own_first(latents)).sample
            pairs = (
                (encode_tiled(model, None, clip, tiling), encoded),
                (decode_tiled(model, None, latents, tiling, together=3), decoded),
            )
        for found, expected in pairs:
            np.testing.assert_allclose(found, np.moveaxis(expected.numpy(), 1, -1), atol=1e-4)


def test_memory_does_not_grow_with_the_clip(copying):
    model, _ = copying

    def peak(t: int) -> int:
        z = np.zeros((1, t, 16, 16, 3), np.float32)
        tracemalloc.start()
        for _ in decode_groups(model, 1.0, z, BOTH):
            pass
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    assert peak(40) < 1.2 * peak(10)


def test_tiles_are_whole_latents(copying):
    odd = Tiling(frames=Tiles(6, 4))
    with pytest.raises(ConfigError, match=r"tiles of 6 frames .* multiples of 4"):
        decode_tiled(copying[0], 1.0, latents(9, 2, 2), odd)
    with pytest.raises(ConfigError, match="leave gaps"):
        Tiles(16, 20)
    with pytest.raises(ConfigError, match="rows and columns or neither"):
        Tiling(rows=SMALL)
    assert OPEN_SORA.frames is None and TENCENT.frames is not None
    assert TENCENT.frames.overlap == 16


@pytest.mark.slow
def test_tiles_on_eight_devices_equal_one():
    config = CausalAutoencoderConfig(
        block_out_channels=(4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=2,
        spatial_compression_ratio=2,
        temporal_compression_ratio=2,
    )
    model, z = CausalAutoencoder(config), latents(9, 4, 4, 2)[:1]
    tiling = Tiling(rows=Tiles(4, 4), columns=Tiles(4, 4), frames=Tiles(8, 8))
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 3, 4, 4, 3), np.float32))
    held, together = tiles_on(make_mesh("fsdp=2,tensor=4"), params["params"])
    placed = []

    class Watched(EachDevice):
        def __call__(self, tiles):
            placed.append(super().__call__(tiles))
            return placed[-1]

    watched = together | {"spread": Watched(*together["spread"])}
    ours = decode_tiled(model, held, z, tiling, **watched)
    alone = decode_tiled(model, params["params"], z, tiling)
    assert ours.shape == (1, 17, 8, 8, 3)
    np.testing.assert_allclose(ours, alone, atol=1e-5)
    # Four tiles of each of two groups of frames, one on each device.
    (tiles,) = placed
    assert tiles.shape[0] == 8 and len({shard.device for shard in tiles.addressable_shards}) == 8
    program = video_tiles._run.lower(model, "decode", together["spread"], held, tiles).compile()
    assert not measure(program).collectives

    def most_held(times: int) -> tuple[int, int]:
        """Bytes at once of arrays on devices and of NumPy's while a clip is streamed; its own."""
        long, size = np.concatenate([z[:, :1], *[z[:, 1:]] * times], axis=1), 0
        tracemalloc.start()
        arrays = 0
        for frames in decode_groups(model, held, long, tiling, **together):
            arrays = max(arrays, sum(x.nbytes for x in jax.live_arrays()))
            size += frames.nbytes
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return arrays + most, size

    placed.clear()
    del program, tiles, ours, alone
    (short, small), (longer, large) = most_held(2), most_held(16)
    print(f"clips of {small} and {large} bytes: {short} and {longer} at once")
    assert longer - short < (large - small) / 4
