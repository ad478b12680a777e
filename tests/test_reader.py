"""The reader of drawn scenes, and the measurement of prompt following that rests on it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from fluxjax.config import TINY, ConfigError
from fluxjax.sample.loading import load_pipeline
from fluxjax.sample.pipeline import Pipeline
from fluxjax.sample.settings import Settings
from fluxjax.train.embedded import evaluate as measure
from fluxjax.train.embedded.evaluate import count_right, draw_prompts
from fluxjax.train.embedded.evaluate_settings import EvaluateSettings, Kind
from fluxjax.train.embedded.phrasing import Caption
from fluxjax.train.embedded.reader import (
    ATTRIBUTES,
    Reading,
    ReadObject,
    read,
    read_relation,
    score,
)
from fluxjax.train.embedded.scenes import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    SHAPES,
    Scene,
    render,
)

SIDE = {"width": 96, "height": 96}


def pictures_of(scenes: Scene, **side) -> np.ndarray:
    return np.asarray(render(scenes, **(SIDE | side)))


def rates(prompts, pictures) -> dict[str, float]:
    """Share of right ones, with everything asked."""
    asked = [c._replace(states_size=(True,) * 3, states_background=True) for c in prompts.captions]
    counts = count_right(prompts._replace(captions=asked), pictures)
    return {name: right / total for name, (right, total) in counts.items()}


@pytest.fixture(scope="module")
def prompts():
    return draw_prompts(120, seed=1, held_out=True, **SIDE)


@pytest.fixture(scope="module")
def drawn(prompts):
    return pictures_of(prompts.scenes)


@pytest.mark.slow
def test_true_pictures_are_read_exactly(prompts, drawn):
    assert min(rates(prompts, drawn).values()) >= 0.99


def test_blurred_and_noisy_pictures_are_read(prompts, drawn):
    noise = np.random.default_rng(0).normal(0, 0.06, drawn.shape)
    blurred = ndimage.gaussian_filter(drawn, (0, 0.7, 0.7, 0)) + noise
    read_back = rates(prompts, np.clip(blurred, -1, 1).astype(np.float32))
    assert min(read_back.values()) >= 0.97, read_back


@pytest.mark.parametrize(("width", "height"), [(112, 80), (256, 208), (64, 64), (80, 160)])
def test_other_sizes_are_read(width, height):
    prompts = draw_prompts(24, seed=2, held_out=False, width=width, height=height)
    pictures = pictures_of(prompts.scenes, width=width, height=height)
    assert min(rates(prompts, pictures).values()) >= 0.95


@pytest.mark.parametrize(("split", "backs"), [(1, (0, 4)), (2, (3, 4)), (1, (1, 0))])
def test_a_gray_object_across_the_seam_is_one_object(prompts, split, backs):
    """Gray is a blend of the two colours that meet there."""
    scenes = Scene(*(field[:1] for field in prompts.scenes))._replace(
        count=np.array([1]),
        shape=np.array([[7, 0, 0]]),
        size=np.array([[1, 0, 0]]),
        colour=np.full((1, 3), list(COLOURS).index("gray")),
        centre=np.full((1, 3, 2), 0.5),
        radius=np.array([[0.17, 0, 0]]),
        background=np.array([backs]),
        split=np.array([split]),
    )
    found = read(pictures_of(scenes)[0])
    assert [(SHAPES[o.shape], list(COLOURS)[o.colour], o.size) for o in found.objects] == [
        ("diamond", "gray", 1)
    ]
    assert (found.background, found.split) == (backs, split)


def test_objects_of_one_colour_that_touch_are_told_apart(prompts):
    scenes = Scene(*(field[:1] for field in prompts.scenes))._replace(
        count=np.array([2]),
        shape=np.array([[2, 2, 0]]),
        colour=np.array([[3, 3, 0]]),
        size=np.array([[2, 2, 0]]),
        centre=np.array([[[0.27, 0.5], [0.735, 0.5], [0, 0]]]),
        radius=np.array([[0.23, 0.23, 0]]),
    )
    found = read(pictures_of(scenes)[0]).objects
    assert [SHAPES[o.shape] for o in found] == ["triangle", "triangle"]


def test_an_empty_picture_and_a_blob_are_no_shapes():
    blank = np.full((96, 96, 3), 0.95, np.float32)
    assert read(blank).objects == () and read(blank).kind == "none"
    blank[44:52, 5:91] = np.array(COLOURS["blue"]) / 127.5 - 1  # a bar
    assert [o.shape for o in read(blank).objects] == [-1]


def red(shape: str, centre=(0.3, 0.5), size: int = 0, colour: str = "red") -> ReadObject:
    return ReadObject(SHAPES.index(shape), list(COLOURS).index(colour), size, centre, 0.12, 0.9)


WANTED = Scene(
    kind=KINDS.index("pair"),
    count=2,
    shape=np.array([0, 3, 0]),
    colour=np.array([0, 5, 0]),
    size=np.array([0, 2, 0]),
    relation=0,
    centre=np.zeros((3, 2)),
    radius=np.zeros(3),
    background=np.array([1, 2]),
    split=0,
)
CIRCLE = red("circle")
STAR = red("star", (0.7, 0.5), 2, "blue")


def marks(
    objects, background=(1, 1), split=0, stated=(True, True, False), back=True, relations=(0,)
):
    reading = Reading(tuple(objects), background, split)
    return score(WANTED, Caption("", stated, back, relations, {}), reading)


@pytest.mark.parametrize(
    ("objects", "options", "wrong"),
    [
        ([CIRCLE, STAR], {}, {}),
        ([STAR, CIRCLE], {}, {}),
        ([CIRCLE._replace(centre=(0.9, 0.5)), STAR], {}, {"relation": (0, 1)}),
        ([CIRCLE._replace(centre=(0.9, 0.5)), STAR], {"relations": (0, 1)}, {}),
        ([CIRCLE._replace(centre=(0.7, 0.1)), STAR], {"relations": (0, 1)}, {"relation": (0, 1)}),
        ([CIRCLE._replace(centre=(0.9, 0.5)), STAR], {"relations": ()}, {"relation": (0, 0)}),
        ([CIRCLE._replace(colour=3), STAR], {}, {"colour": (1, 2)}),
        ([CIRCLE._replace(shape=-1), STAR], {}, {"shape": (1, 2)}),
        ([CIRCLE._replace(size=1), STAR], {}, {"size": (1, 2)}),
        ([CIRCLE._replace(size=1), STAR], {"stated": (False, True, False)}, {"size": (1, 1)}),
        ([CIRCLE, STAR], {"background": (0, 0)}, {"background": (0, 1)}),
        ([CIRCLE, STAR], {"background": (1, 2), "split": 1}, {"background": (0, 1)}),
        ([CIRCLE, STAR], {"background": (0, 0), "back": False}, {"background": (0, 0)}),
        ([CIRCLE, STAR, red("ring")], {}, {"count": (0, 1)}),
        (
            [STAR],
            {},
            {
                "colour": (1, 2),
                "shape": (1, 2),
                "size": (1, 2),
                "count": (0, 1),
                "relation": (0, 1),
            },
        ),
    ],
)
def test_score_marks_what_is_wrong_and_only_what_the_caption_states(objects, options, wrong):
    found = marks(objects, **options)
    assert tuple(found) == ATTRIBUTES
    expected = {
        "colour": (2, 2),
        "shape": (2, 2),
        "size": (2, 2),
        "count": (1, 1),
        "relation": (1, 1),
        "background": (1, 1),
    } | wrong
    everything = all(right == asked for right, asked in expected.values())
    assert found == expected | {"all": (int(everything), 1)}


@pytest.mark.parametrize(
    ("centre", "expected"), [((0.1, 0.6), 0), ((0.9, 0.4), 1), ((0.6, 0.1), 2), ((0.4, 0.9), 3)]
)
def test_a_relation_follows_the_longer_distance(centre, expected):
    assert read_relation(red("circle", centre), red("star", (0.5, 0.5))) == expected


@pytest.mark.slow
def test_prompts_are_different_and_follow_the_seed():
    first = draw_prompts(8, seed=1, held_out=False, **SIDE)
    again = draw_prompts(8, seed=1, held_out=False, **SIDE)
    other = draw_prompts(8, seed=2, held_out=False, **SIDE)
    texts = [caption.text for caption in first.captions]
    both = draw_prompts(40, seed=1, held_out=True, manner="and", **SIDE)
    assert all(len(caption.relations) in (0, 2) for caption in both.captions)
    assert set(both.scenes.kind) == {KINDS.index("pair"), KINDS.index("row")}
    few = draw_prompts(30, seed=1, held_out=False, colours=("white", "red"), **SIDE)
    shown = few.scenes.colour[np.arange(3) < few.scenes.count[:, None]]
    assert {list(COLOURS)[i] for i in shown} == {"white", "red"}
    assert len(set(texts)) == 8 and first.captions == again.captions
    assert len(set(texts) & {caption.text for caption in other.captions}) < 3


WIDE = {"width": 128, "height": 64}


class Painter(Pipeline):
    """Stands in for a pipeline: it draws the scenes, but some of them in the wrong colour."""

    def __init__(self, wrong: int):
        self.defaults = Settings(width=96, height=96, steps=2)
        self.wrong, self.batches, self.seeds, self.settings = wrong, [], [], None
        self.config, self.dtype, self.mesh = TINY, np.dtype(np.float32), None
        self.known, self.sizes = {}, []
        for manner, size in (("sentence", SIDE), ("and", SIDE), ("sentence", WIDE)):
            prompts = draw_prompts(8, seed=5, held_out=True, manner=manner, **size)
            for i, caption in enumerate(prompts.captions):
                self.known[size["width"], caption.text] = prompts.scene(i)

    def encode_pictures(self, pictures):
        return pictures

    def decode(self, latents):
        return latents

    def draw(self, settings, *, prompts, seeds):
        self.settings = settings
        self.batches.append(len(prompts))
        self.seeds += seeds
        size = {"width": settings.width, "height": settings.height}
        self.sizes.append((settings.width, settings.height))
        known = [self.known[settings.width, text] for text in prompts]
        scenes = Scene(*map(np.stack, zip(*known, strict=True)))
        # Seeds count pictures: the first `wrong` are drawn in another colour, one
        # that no background has.
        shift = (np.array(seeds) - settings.seed < self.wrong)[:, None]
        scenes = scenes._replace(colour=np.where(shift, (scenes.colour + 1) % 9, scenes.colour))
        return np.round((pictures_of(scenes, **size) + 1) * 127.5).astype(np.uint8)


@pytest.mark.slow
def test_evaluation_counts_by_kind_writes_a_sheet_and_prints(tmp_path, capsys, monkeypatch):
    kinds = measure.KINDS | {"other sizes": Kind("sentence", ((128, 64),))}
    monkeypatch.setattr(measure, "KINDS", kinds)
    pipeline = Painter(wrong=3)
    settings = EvaluateSettings(
        prompts=8,
        kinds=("sentences", "X and Y", "other sizes"),
        batch=6,
        seed=5,
        true_cfg_scale=2.0,
        sheet=tmp_path / "sheet.png",
    )
    found = measure.evaluate_pipeline(pipeline, settings)
    assert pipeline.batches == [6] * 6 and pipeline.seeds[:8] == list(range(5, 13))
    assert pipeline.sizes == [(96, 96)] * 4 + [(128, 64)] * 2
    assert pipeline.settings.true_cfg == 2.0
    for kind in settings.kinds:
        assert found.rate(kind, "all") == 5 / 8 and found.rate(kind, "shape") == 1
        assert found.rate(kind, "colour") < 1 and found.prompts[kind] == 8
    assert found.rate("reader", "all") == 1 and found.psnr > 45 and found.prompts["reader"] == 24
    measure.print_evaluation(found)
    assert "0.625 of 8" in capsys.readouterr().out
    content = json.loads(found.to_json())
    assert content["counts"]["X and Y"]["all"] == {"right": 5, "asked": 8}

    from PIL import Image

    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width == 6 * 202 + 10  # columns of pictures enlarged to 192
        pixels = np.asarray(sheet)
    first = next(iter(pipeline.known.values()))
    corner = list(BACKGROUNDS.values())[first.background[0]]
    assert np.abs(pixels[12, 12].astype(int) - corner).max() <= 2
    assert (pixels[10 + 196 : 10 + 230] < 100).any(), "no captions"


def test_unknown_kinds_are_named():
    with pytest.raises(ConfigError, match=r"'other orders'.*got 'proverbs'"):
        EvaluateSettings(kinds=("proverbs",))


@pytest.mark.slow
def test_a_mesh_measures_the_same(tmp_path, monkeypatch):
    """Five prompts, three at once: on eight devices eight at once."""
    from PIL import Image

    opened = []

    def scanned(model, **options):
        opened.append(load_pipeline(model, scan_layers=True, **options))
        return opened[-1]

    monkeypatch.setattr(measure, "load_pipeline", scanned)
    settings = EvaluateSettings(
        prompts=5, kinds=("terse",), batch=3, steps=1, json=True, sheet=tmp_path / "one.png"
    )
    one = measure.evaluate(settings)
    mesh = {"mesh": "fsdp=4,tensor=2", "sheet": tmp_path / "many.png"}
    many = measure.evaluate(replace(settings, **mesh))
    kernel = opened[1].params("transformer")["transformer_blocks"]["ff"]["net_2"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 8 == kernel.size
    assert many.counts == one.counts and many.psnr == pytest.approx(one.psnr, rel=1e-5)
    assert one.rate("reader", "all") == 1
    sheets = [np.asarray(Image.open(tmp_path / f"{name}.png"), int) for name in ("one", "many")]
    assert np.abs(sheets[0] - sheets[1]).max() <= 1 and sheets[0].std() > 5
    with pytest.raises(ConfigError, match="does not fit 8 devices"):
        measure.evaluate(replace(settings, mesh="fsdp=3"))


@pytest.mark.slow
def test_samplers_draw_the_same_prompts_and_are_plotted(tmp_path, capsys, monkeypatch):
    """The first model is right from three steps on, the other one never wholly."""

    class Learner(Painter):
        def check(self, settings):
            if settings.sampler == "pndm":
                raise ConfigError("no such sampler")

        def draw(self, settings, *, prompts, seeds):
            self.wrong = 0 if settings.steps > 2 else 8
            return super().draw(settings, prompts=prompts, seeds=seeds)

    painters = {"one": Learner(0), "other": Painter(wrong=3)}
    painters["other"].check = lambda settings: None
    loras = {}

    def load(model, **choices):
        loras[model] = choices["loras"]
        return painters[model]

    monkeypatch.setattr(measure, "load_pipeline", load)
    plot = tmp_path / "plot.png"
    settings = EvaluateSettings(
        model="one",
        samplers=("ddim,dpm++", "other:"),
        step_counts=(4, 2, 4),
        prompts=8,
        seed=5,
        plot=plot,
        guidance=3.0,
        lora=("a.safetensors",),
    )
    found = measure.evaluate(settings)
    assert painters["one"].settings.guidance == painters["other"].settings.guidance == 3.0
    assert loras == {"one": ("a.safetensors",), "other": ()} and len(found.points) == 6
    rates = {(str(p.sampler), p.steps): p.rate("all") for p in found.points}
    own = {("other", 2): 5 / 8, ("other", 4): 5 / 8}
    ones = {(f"one {name}", n): n == 4 for name in ("ddim", "dpm++") for n in (2, 4)}
    assert rates == own | ones
    assert painters["one"].settings.sampler == "dpm++" and painters["other"].settings.steps == 4
    assert "one dpm++" in capsys.readouterr().out and plot.read_bytes().startswith(b"\x89PNG")
    assert json.loads(found.to_json())["points"][0]["sampler"] == "ddim"
    with pytest.raises(ConfigError, match="no such sampler"):
        measure.evaluate(replace(settings, samplers=("pndm",)))


@pytest.mark.parametrize(
    "options",
    [
        {"prompts": 0},
        {"kinds": ()},
        {"colours": ("mauve",)},
        {"batch": 0},
        {"seed": -1},
        {"step_counts": (0,)},
    ],
)
def test_settings_that_mean_nothing_are_refused(options):
    with pytest.raises(ConfigError, match="must"):
        EvaluateSettings(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 3}, "step_counts are those of samplers: leave out steps, or samplers"),
        ({"sheet": Path("sheet.png")}, "leave out sheet, or samplers"),
        ({"task": "edit"}, "leave out task, or samplers"),
        ({"kinds": ("other sizes",)}, "own size: leave out kinds 'other sizes', or samplers"),
        ({"lora": ("a.safetensors",)}, "tiny is none of the samplers': leave out lora"),
        ({"step_counts": ()}, "step_counts must name at least one number"),
    ],
)
def test_what_is_not_heard_beside_samplers_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        EvaluateSettings(samplers=("tiny-sd:ddim",), **options)
