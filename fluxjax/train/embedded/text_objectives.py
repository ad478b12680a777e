"""Objectives that train text encoders: contrastive, masked tokens, read-out of a scene."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from fluxjax.train.embedded.phrasing import Caption
from fluxjax.train.embedded.scenes import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    SHAPES,
    SIZES,
    SPLITS,
    Scene,
)

MAX_LOGIT_SCALE = 100.0  # CLIP's clip, which keeps the temperature from running away
LOGIT_SCALE_INIT = float(np.log(1 / 0.07))


def contrastive_logits(
    text: Float[Array, "b d"], image: Float[Array, "b d"], log_scale: Float[Array, ""]
) -> Float[Array, "b b"]:
    """Cosine similarity of every text with every picture, times the learned temperature."""

    def unit(x: Float[Array, "b d"]) -> Float[Array, "b d"]:
        x = x.astype(jnp.float32)
        return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12)

    scale = jnp.minimum(jnp.exp(log_scale), MAX_LOGIT_SCALE)
    return scale * unit(text) @ unit(image).T


def contrastive_loss(
    text: Float[Array, "b d"], image: Float[Array, "b d"], log_scale: Float[Array, ""]
) -> Float[Array, ""]:
    """Symmetric InfoNCE: each text finds its picture, each picture its text.

    Source: Radford et al. 2021, figure 3. `log_scale` is CLIP's `logit_scale`.
    """
    logits = contrastive_logits(text, image, log_scale)
    own = jnp.arange(logits.shape[0])
    losses = [
        optax.softmax_cross_entropy_with_integer_labels(rows, own) for rows in (logits, logits.T)
    ]
    return 0.5 * (losses[0].mean() + losses[1].mean())


def mask_tokens(
    key: PRNGKeyArray,
    input_ids: Int[Array, "b l"],
    attention_mask: Int[Array, "b l"],
    *,
    mask_id: int,
    eos_id: int,
) -> tuple[Int[Array, "b l"], Bool[Array, "b l"]]:
    """Hide 15 % of the tokens behind the sentinel `mask_id`, but never padding or the end token.

    Returns the ids to read and which of them are hidden.
    """
    hidden = jax.random.bernoulli(key, 0.15, input_ids.shape)
    hidden = hidden & (attention_mask != 0) & (input_ids != eos_id)
    return jnp.where(hidden, mask_id, input_ids), hidden


def masked_token_loss(
    logits: Float[Array, "b l v"], input_ids: Int[Array, "b l"], hidden: Bool[Array, "b l"]
) -> Float[Array, ""]:
    """Mean cross-entropy of the hidden tokens (Devlin et al. 2018)."""
    loss = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), input_ids)
    return (loss * hidden).sum() / jnp.maximum(hidden.sum(), 1)


_OBJECT = (("shape", len(SHAPES) + 1), ("colour", len(COLOURS) + 1), ("size", len(SIZES) + 1))
QUESTIONS: dict[str, int] = {
    "kind": len(KINDS),
    "count": 3,
    "orientation": 3,  # of a pair: beside, above, no pair
    **{f"{name} {i}": classes for i in range(3) for name, classes in _OBJECT},
    "background 0": len(BACKGROUNDS) + 1,
    "background 1": len(BACKGROUNDS) + 1,
    "split": len(SPLITS) + 1,
}
_CLASSES = np.array(list(QUESTIONS.values()))


def scene_labels(scenes: Scene, captions: list[Caption]) -> Int[np.ndarray, "n questions"]:
    """The right answers to QUESTIONS for scenes (leading axis n) and their captions.

    The last class means "not said". Objects are in reading order (left to right, top to bottom),
    which any paraphrase determines; the scene's own order it does not: "a ring under a star" and
    "a star over a ring" are two scenes and one picture.
    """
    s = jax.tree.map(np.asarray, scenes)
    n = len(captions)
    pair = s.kind == KINDS.index("pair")
    # Relations right of and below: object 1 is read first.
    order = np.where((pair & (s.relation % 2 == 1))[:, None], [1, 0, 2], [0, 1, 2])
    said_size = np.array([c.states_size for c in captions]).reshape(n, 3)
    size = np.where(said_size, s.size, len(SIZES))
    # Counted objects are all alike: the first speaks for them.
    used = np.arange(3) < np.where(s.kind == KINDS.index("count"), 1, s.count)[:, None]
    objects = [
        np.where(used, np.take_along_axis(values, order, 1), none)
        for values, none in ((s.shape, len(SHAPES)), (s.colour, len(COLOURS)), (size, len(SIZES)))
    ]
    said = np.array([c.states_background for c in captions])
    first = np.where(said, s.background[:, 0], len(BACKGROUNDS))
    second = np.where(said & (s.split > 0), s.background[:, 1], len(BACKGROUNDS))
    columns = [s.kind, s.count - 1, np.where(pair, s.relation // 2, 2)]
    columns += [values[:, i] for i in range(3) for values in objects]
    columns += [first, second, np.where(said, s.split, len(SPLITS))]
    return np.stack(columns, axis=1).astype(np.int32)


TOKEN_QUESTIONS: dict[str, int] = {"place": 3, **dict(_OBJECT)}


def tokens_of(span: tuple[int, int], offsets: Sequence[tuple[int, int]]) -> list[int]:
    """Which tokens, given their (start, stop) in the text, lie in a span of characters."""
    return [
        i
        for i, (start, stop) in enumerate(offsets)
        if start < stop and start < span[1] and stop > span[0]
    ]


def token_labels(
    scenes: Scene,
    captions: Sequence[Caption],
    labels: Int[np.ndarray, "n questions"],
    offsets: Sequence[Sequence[tuple[int, int]]],
) -> Int[np.ndarray, "n l token_questions"]:
    """TOKEN_QUESTIONS for each token that names an object (its size, colour or shape), else -1.

    "place" is the object's number in reading order. Whether a word speaks of the first or the
    second object depends on the order of words *and* on the relation; asked only of the whole
    sentence, an encoder needs very long to find that out.
    """
    kind, relation = np.asarray(scenes.kind), np.asarray(scenes.relation)
    first_column = list(QUESTIONS).index("shape 0")
    length = max(map(len, offsets))
    result = np.full((len(captions), length, len(TOKEN_QUESTIONS)), -1, np.int32)
    for i, caption in enumerate(captions):
        flip = kind[i] == KINDS.index("pair") and relation[i] % 2 == 1
        for name, span in caption.spans.items():
            if name[0] not in "czs":
                continue
            place = int(name[1]) ^ 1 if flip else int(name[1])
            column = first_column + 3 * place
            answer = [place, *labels[i, column : column + 3]]
            for token in tokens_of(span, offsets[i]):
                result[i, token] = answer
    return result


class TokenReadout(nn.Module):
    """Answers TOKEN_QUESTIONS at every token by one linear layer; thrown away after training."""

    @nn.compact
    def __call__(self, states: Float[Array, "b l d"]) -> tuple[Float[Array, "b l _"], ...]:
        return tuple(
            nn.Dense(classes, name=name)(states) for name, classes in TOKEN_QUESTIONS.items()
        )


def token_readout_loss(
    answers: tuple[Float[Array, "b l _"], ...], labels: Int[Array, "b l token_questions"]
) -> Float[Array, ""]:
    """Mean cross-entropy over the tokens that name an object."""
    total = jnp.zeros(())
    for i, logits in enumerate(answers):
        asked = labels[..., i] >= 0
        loss = optax.softmax_cross_entropy_with_integer_labels(
            logits, jnp.maximum(labels[..., i], 0)
        )
        total += (loss * asked).sum() / jnp.maximum(asked.sum(), 1)
    return total / len(answers)


class SceneReadout(nn.Module):
    """Answers QUESTIONS from an encoder's output by one attention with a learned query for each.

    As weak as the first layer that will read the encoder, so that what it can answer is plain to
    see in the sequence. Thrown away after training.
    """

    heads: int = 4

    @nn.compact
    def __call__(self, states: Float[Array, "b l d"]) -> Float[Array, "b questions classes"]:
        width = states.shape[-1]
        shape = (len(QUESTIONS), self.heads, width // self.heads)
        query = self.param("query", nn.initializers.normal(1.0), shape)
        key, value = (
            nn.Dense(width, use_bias=False, name=name)(states).reshape(
                *states.shape[:2], self.heads, -1
            )
            for name in ("key", "value")
        )
        logits = jnp.einsum("qhk,blhk->bqhl", query, key) * shape[-1] ** -0.5
        read = jnp.einsum("bqhl,blhk->bqhk", jax.nn.softmax(logits), value)
        answer_init = nn.initializers.normal(width**-0.5)
        answer = self.param("answer", answer_init, (*shape, int(_CLASSES.max())))
        answers = jnp.einsum("bqhk,qhkc->bqc", read, answer)
        exists = np.arange(_CLASSES.max()) < _CLASSES[:, None]
        return jnp.where(exists[None], answers, -1e9)


def readout_loss(
    logits: Float[Array, "b questions classes"], labels: Int[Array, "b questions"]
) -> Float[Array, ""]:
    """Mean cross-entropy over all questions."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
