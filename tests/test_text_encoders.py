"""Training of tokenizers, T5 and CLIP: vocabularies, objectives, and both stages run short."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from fluxjax.checkpoint.pipeline_folder import read_config
from fluxjax.config import TINY
from fluxjax.families.flux import encode_prompts
from fluxjax.hub import tiny_folder
from fluxjax.text.tokenizers import load_clip_tokenizer, load_t5_tokenizer
from fluxjax.train.embedded import paraphrase
from fluxjax.train.embedded import text_encoders as stages
from fluxjax.train.embedded import text_objectives as objectives
from fluxjax.train.embedded.phrasing import Caption
from fluxjax.train.embedded.scenes import COLOURS, KINDS, SHAPES, Scene
from fluxjax.train.embedded.vocabulary import train_clip_tokenizer

SETTINGS = stages.TextTraining(
    tokenizer_captions=4000,
    t5_steps=3,
    t5_batch=8,
    clip_steps=3,
    clip_batch=8,
    held_out_captions=64,
    vision=replace(stages.TINY_VISION, num_hidden_layers=1),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Both tokenizers, trained on a few thousand captions, and the fitting configuration."""
    folder = tmp_path_factory.mktemp("text")
    stages.train_tokenizers(folder, TINY, SETTINGS)
    config = stages.fit_vocabularies(folder, TINY)
    return folder, replace(
        config,
        text_encoder=replace(config.text_encoder, num_hidden_layers=1),
        text_encoder_2=replace(config.text_encoder_2, num_layers=1),
    )


@pytest.mark.slow
def test_every_caption_of_the_world_is_read_whole(trained):
    folder, config = trained
    texts = stages.draw(SETTINGS, 5, 4000).texts
    texts += stages.draw(SETTINGS, 6, 4000, held_out=True).texts
    t5 = load_t5_tokenizer(folder / "tokenizer_2")
    assert not any(t5(texts, config.max_sequence_length).removed)
    unknown = t5.backend.token_to_id("<unk>")
    assert unknown not in t5(["A photo of a cat, 3 dogs & (two) Birds!"], 64).input_ids
    clip = load_clip_tokenizer(folder / "tokenizer")
    assert not any(clip(texts, SETTINGS.clip_text_length).removed)


def test_transformers_reads_the_tokenizers(trained):
    folder, config = trained
    texts = [*stages.draw(SETTINGS, 7, 100).texts, "", "A cat 猫 😀\n<extra_id_0>", "é " * 60]
    for kind, load, name, length in (
        (transformers.CLIPTokenizer, load_clip_tokenizer, "tokenizer", 77),
        (transformers.T5TokenizerFast, load_t5_tokenizer, "tokenizer_2", 32),
    ):
        theirs = kind.from_pretrained(folder / name)
        assert theirs.model_max_length == length
        expected = theirs(texts, padding="max_length", truncation=True, return_tensors="np")
        np.testing.assert_array_equal(load(folder / name)(texts).input_ids, expected.input_ids)
    clip = config.text_encoder
    vocabulary = json.loads((folder / "tokenizer" / "vocab.json").read_text())
    assert vocabulary["<|startoftext|>"] == clip.bos_token_id == clip.vocab_size - 2
    assert vocabulary["<|endoftext|>"] == clip.eos_token_id == clip.vocab_size - 1
    t5 = load_t5_tokenizer(folder / "tokenizer_2").backend
    assert [t5.token_to_id(t) for t in ("<pad>", "</s>", "<unk>")] == [0, 1, 2]
    assert t5.token_to_id("<extra_id_0>") == config.text_encoder_2.vocab_size - 1


def test_merges_are_the_most_frequent_pairs(tmp_path):
    train_clip_tokenizer(["aab aab ab"], tmp_path, vocab_size=516)
    assert (tmp_path / "merges.txt").read_text().split("\n")[1:3] == ["a b</w>", "a ab</w>"]
    with pytest.raises(ValueError, match="514"):
        train_clip_tokenizer(["a"], tmp_path, vocab_size=500)


def test_contrastive_loss_equals_transformers():
    rng = np.random.default_rng(0)
    text, image = rng.normal(size=(2, 6, 8)).astype(np.float32)
    ours = objectives.contrastive_loss(jnp.array(text), jnp.array(image), jnp.array(1.3))
    a, b = (torch.nn.functional.normalize(torch.tensor(v), dim=-1) for v in (text, image))
    expected = transformers.models.clip.modeling_clip.image_text_contrastive_loss(
        a @ b.T * torch.tensor(1.3).exp()
    )
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    hot = objectives.contrastive_logits(jnp.array(text), jnp.array(text), jnp.array(50.0))
    np.testing.assert_allclose(jnp.diagonal(hot), objectives.MAX_LOGIT_SCALE, rtol=1e-4)


def test_masks_leave_padding_and_end_alone():
    ids = jnp.array([[7, 8, 9, 1, 0, 0]] * 400)
    mask = (ids != 0).astype(jnp.int32)
    read, hidden = objectives.mask_tokens(jax.random.key(0), ids, mask, mask_id=99, eos_id=1)
    np.testing.assert_array_equal(read == 99, hidden)
    np.testing.assert_array_equal(read[:, 3:], ids[:, 3:])
    np.testing.assert_allclose(hidden[:, :3].mean(), 0.15, atol=0.05)
    logits = 30.0 * jax.nn.one_hot(jnp.where(hidden, ids, 5), 10)  # right exactly where hidden
    assert objectives.masked_token_loss(logits, ids, hidden) < 1e-6
    assert objectives.masked_token_loss(logits, ids, ~hidden) > 1


def said_as(sizes, background, spans=None):
    return Caption("", sizes, background, (), spans or {})


def scene(kind, count, relation, shapes, colours):
    one = np.ones(3)
    fields = Scene(
        KINDS.index(kind),
        count,
        shapes,
        colours,
        [0, 1, 2],
        relation,
        np.zeros((3, 2)),
        one,
        [2, 4],
        1,
    )
    return Scene(*(np.asarray(f)[None] for f in fields))


def test_labels_follow_the_picture_not_the_wording():
    said = [said_as((True, False, False), True)]
    other = [said_as((False, True, False), True)]
    under = scene("pair", 2, 3, [1, 4, 0], [5, 6, 0])._replace(size=np.array([[2, 0, 0]]))
    over = scene("pair", 2, 2, [4, 1, 0], [6, 5, 0])._replace(size=np.array([[0, 2, 0]]))
    labels = objectives.scene_labels(under, said)
    np.testing.assert_array_equal(labels, objectives.scene_labels(over, other))
    answers = dict(zip(objectives.QUESTIONS, labels[0].tolist(), strict=True))
    assert (answers["shape 0"], answers["shape 1"], answers["shape 2"]) == (4, 1, len(SHAPES))
    assert (answers["size 0"], answers["size 1"]) == (3, 2)  # not said, large
    assert answers["orientation"] == 1
    counted = objectives.scene_labels(scene("count", 3, 0, [3] * 3, [2] * 3), said)[0]
    answers = dict(zip(objectives.QUESTIONS, counted.tolist(), strict=True))
    assert (answers["count"], answers["shape 0"], answers["shape 1"]) == (2, 3, len(SHAPES))
    silent = objectives.scene_labels(under, [said_as((False,) * 3, False)])[0]
    assert silent[-3:].tolist() == [5, 5, 3]


def test_tokens_are_asked_about_the_object_they_name(trained):
    folder, _ = trained
    drawn = stages.draw(SETTINGS, 3, 400)
    encodings = load_t5_tokenizer(folder / "tokenizer_2").backend.encode_batch(drawn.texts)
    answers = objectives.scene_labels(drawn.scenes, drawn.captions)
    labels = objectives.token_labels(
        drawn.scenes, drawn.captions, answers, [e.offsets for e in encodings]
    )
    asked = 0
    for encoding, row in zip(encodings, labels, strict=True):
        for token, (_, shape, colour, _) in zip(
            encoding.tokens, row, strict=False
        ):  # rows are padded
            word = token.strip("▁").lower()
            if word in SHAPES:
                asked += 1
                assert shape == SHAPES.index(word)
            if word in COLOURS and colour >= 0:  # a background's has no label
                asked += 1
                assert colour == list(COLOURS).index(word)
    assert asked > 800


@pytest.mark.parametrize(("relation", "places"), [(2, (0, 1)), (3, (1, 0)), (1, (1, 0))])
def test_places_are_in_reading_order(relation, places):
    text = "a red ring, a blue star"
    words = [(m.start(), m.end()) for m in re.finditer(r"\w+", text)]
    spans = dict(zip(("c0", "s0", "c1", "s1"), [words[i] for i in (1, 2, 4, 5)], strict=True))
    drawn = scene("pair", 2, relation, [0, 1, 2], [0, 1, 2])
    said = [said_as((False,) * 3, False, spans)]
    answers = objectives.scene_labels(drawn, said)
    labels = objectives.token_labels(drawn, said, answers, [words])[0, :, 0]
    assert labels.tolist() == [-1, places[0], places[0], -1, places[1], places[1]]


@pytest.mark.slow
def test_readout_gives_only_answers_that_exist():
    readout = objectives.SceneReadout()
    states = jax.random.normal(jax.random.key(0), (64, 32, 32)) * 50
    params = jax.jit(readout.init)(jax.random.key(1), states)
    answers = jax.jit(readout.apply)(params, states)
    assert (answers.argmax(-1) < np.array(list(objectives.QUESTIONS.values()))[None]).all()
    assert float(objectives.readout_loss(answers, answers.argmax(-1))) < 0.7


@pytest.mark.slow
def test_stages_write_what_transformers_opens_and_repeat_by_seed(trained, tmp_path):
    folder, config = trained
    report = stages.train_t5(folder, tmp_path / "a", config, SETTINGS)
    assert set(objectives.QUESTIONS) < set(report) and report["truncated"] == 0
    first = load_file(folder / "text_encoder_2" / "model.safetensors")
    stages.train_t5(folder, tmp_path / "b", config, SETTINGS)
    again = load_file(folder / "text_encoder_2" / "model.safetensors")
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
    report = stages.train_clip(folder, tmp_path / "a", config, SETTINGS)
    assert 0 <= report["text to picture (held out)"] <= 1
    for kind, name in (
        (transformers.T5EncoderModel, "text_encoder_2"),
        (transformers.CLIPTextModel, "text_encoder"),
    ):
        _, info = kind.from_pretrained(folder / name, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]


@pytest.fixture(scope="module")
def warm(trained):
    """(the embedded model's encoders, the same behind the new tokenizers, their configuration)."""
    old = paraphrase.open_encoders(tiny_folder(), read_config(tiny_folder()))
    config = stages.fit_vocabularies(trained[0], read_config(tiny_folder()))
    return old, paraphrase.warm_start(old, config, trained[0]), config


def test_encoders_behind_new_tokenizers_say_the_same(warm):
    old, new, _ = warm
    texts = ["a red circle to the left of a blue star", "three green squares on a black background"]

    def encode(e):
        return encode_prompts((e.clip, e.t5), (e.params["clip"], e.params["t5"]), e.ids(texts))

    assert not np.array_equal(old.ids(texts).t5, new.ids(texts).t5)  # other numbers, same pieces
    for a, b in zip(jax.tree.leaves(encode(old)), jax.tree.leaves(encode(new)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.slow
def test_words_learn_from_their_counterparts_and_others_from_others(warm):
    _, new, _ = warm
    lesson = paraphrase.draw_lesson(new, new, paraphrase.ParaphraseStage(), 5, 64)
    back = new.t5_tokenizer.backend
    scene_words = {*COLOURS, *SHAPES}
    asked = 0
    for row in range(64):
        read, plain = (
            [back.id_to_token(i) for i in ids[row]] for ids in (lesson.ids.t5, lesson.plain.t5)
        )
        for i, word in enumerate(w.strip("▁") for w in read):
            navy_blue = word == "blue" and read[i - 1].strip("▁") == "navy"
            if word in scene_words and not navy_blue and lesson.weight[row, i] == 1:
                (j,) = np.flatnonzero(lesson.source[row, i])
                asked += 1
                assert plain[j].strip("▁") == word
                assert lesson.other[row, j] == 0
        end, its = read.index("</s>"), plain.index("</s>")
        assert lesson.source[row, end, its] == 1 and lesson.other[row, its] == 1
    assert asked > 100
    states = jax.random.normal(jax.random.key(0), (64, new.length, 8))
    words, others = paraphrase.distance(
        states,
        states,
        lesson._replace(
            source=np.broadcast_to(np.eye(new.length, dtype=np.float32), lesson.source.shape),
            other=np.ones_like(lesson.other),
        ),
    )
    assert float(words) < 1e-10 and float(others) < 1e-5
    moved = lesson.weight[..., None] * np.ones(8, np.float32)
    words, _ = paraphrase.distance(
        jnp.einsum("bst,btd->bsd", lesson.source, states) + moved, states, lesson
    )
    squares = np.square(lesson.weight)
    np.testing.assert_allclose(
        words, (squares * lesson.weight).sum() / lesson.weight.sum(), rtol=1e-4
    )


@pytest.mark.slow
def test_paraphrases_come_nearer_to_their_sentence(trained, warm, tmp_path):
    folder, _ = trained
    config = warm[2]
    teacher = shutil.copytree(tiny_folder(), tmp_path / "teacher")
    for file in sorted(teacher.glob("text_encoder*/model.safetensors")):
        _disturb(file)
    stage = paraphrase.ParaphraseStage(
        teacher=teacher, steps=25, batch=16, learning_rate=5e-4, held_out_captions=64
    )
    first = replace(stage, steps=1, learning_rate=0.0)
    before = paraphrase.train_paraphrases(folder, config, first, tmp_path / "a")
    after = paraphrase.train_paraphrases(folder, config, stage, tmp_path / "b")
    assert after["words"] < 0.9 * before["words"]
    assert after["pooled held out"] < 0.95 * before["pooled held out"]
    _, info = transformers.T5EncoderModel.from_pretrained(
        folder / "text_encoder_2", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]


def _disturb(file: Path) -> None:
    """Matrices with noise of half their size: an encoder that other words lead astray."""
    rng, disturbed = np.random.default_rng(0), {}
    for name, tensor in load_file(file).items():
        values = np.asarray(tensor, np.float32)
        if values.ndim == 2:
            values = values + 0.5 * values.std() * rng.standard_normal(values.shape)
        disturbed[name] = values.astype(np.float32)
    save_file(disturbed, file)
