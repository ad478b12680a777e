"""SIGKILL at seeded moments of what training leaves behind: LoRA files, and its cache."""

import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import jax
import optax
import pytest
from drawn_files import ENCODERS, encode_text, number_of, write_folder
from safetensors.numpy import load
from test_faults import Server, server  # noqa: F401
from trainer import cached

from fluxjax.checkpoint.templates import abstract_params
from fluxjax.checkpoint.training_state import StateStore
from fluxjax.config import TINY, LoraConfig
from fluxjax.models.lora import init_lora, split_scales
from fluxjax.train.data.dataset import open_dataset
from fluxjax.train.export import export_run
from fluxjax.train.recipe import FinetuneRecipe, recipe_toml
from fluxjax.train.step import init_state

PICTURES = 60


@pytest.mark.slow
def test_a_killed_export_leaves_the_old_or_the_new(server: Server, tmp_path):  # noqa: F811
    """At any moment, and in the midst of writing; the next one removes what is left."""
    run, out = tmp_path / "run", tmp_path / "out" / "lora.safetensors"
    recipe = FinetuneRecipe(folder=run, lora=LoraConfig(rank=128, targets=("to_q", "to_k")))
    run.mkdir()
    (run / "recipe.toml").write_text(recipe_toml(recipe))
    with StateStore(run / "checkpoints") as store:
        for step in (1, 2):
            tree = init_lora(jax.random.key(step), abstract_params(TINY.transformer), recipe.lora)
            trained = {"transformer": split_scales(tree)[0]}
            store.save(step, init_state(trained, optax.sgd(1.0)))
    whole = [export_run(run, step=step, out=out).read_bytes() for step in (1, 2)]
    chance, part, amid = random.Random(0), out.with_name(f".{out.name}.part"), 0
    for number in range(40):
        if number >= 8 and amid:  # a busy machine may need more of them
            break
        child = server.start(f"export{number}", run, out, program="export")
        child.until("written")
        if number % 2:
            time.sleep(chance.uniform(0, 0.3))
        else:
            end = time.monotonic() + 120
            while not part.exists() and time.monotonic() < end:
                pass
            time.sleep(chance.uniform(0, 0.003))
        child.kill()
        assert child.wait() == -signal.SIGKILL, child.said
        assert out.read_bytes() in whole
        amid += part.exists()
    assert amid, "no kill came while a file was being written"
    export_run(run, step=1, out=out)
    assert out.read_bytes() == whole[0] and list(out.parent.iterdir()) == [out]


@pytest.mark.slow
def test_a_killed_precompute_leaves_whole_entries(server: Server, tmp_path):  # noqa: F811
    """The next one goes on from them; every latent and text is of its own picture."""
    source, cache = write_folder(tmp_path / "pictures", PICTURES), tmp_path / "cache"
    given, chance, cut = cached(str(source), str(cache)), random.Random(0), 0
    for number in range(6):
        before, end = _entries(cache), time.monotonic() + 120
        child = server.start(f"fill{number}", source, cache, program="precompute")
        while _entries(cache) == before and time.monotonic() < end:
            pass
        time.sleep(number % 2 * chance.uniform(0, 0.04))
        child.kill()
        cut += child.wait() == -signal.SIGKILL
        for entry in _entries(cache):
            load(entry.read_bytes())
    assert cut >= 4, "it was done before the kills came"
    for left in cache.rglob(".*.part"):
        os.utime(left, (0, 0))
    made: Counter[str] = Counter()

    def counted(images):
        made["pictures"] += len(images)
        return ENCODERS.encode_image(images)

    data = open_dataset(given, ENCODERS._replace(encode_image=counted), batch=1, seed=0)
    data.fill()
    assert made["pictures"] < PICTURES, "nothing of what was made before the kills was kept"
    seen = [number_of(batch.latents[0]) for batch in map(data, range(PICTURES))]
    assert sorted(seen) == list(range(PICTURES))
    for number, batch in zip(seen, map(data, range(PICTURES)), strict=True):
        heard = encode_text([f"picture {number}"])
        assert (batch.conditioning.sequence == heard.sequence).all()
    assert not list(cache.rglob(".*")), "leftovers"


def _entries(cache: Path) -> set[Path]:
    """Files of arrays under the names that count."""
    files = (p for kind in ("latents", "text") for p in (cache / kind).rglob("*") if p.is_file())
    return {path for path in files if not path.name.startswith(".")}
