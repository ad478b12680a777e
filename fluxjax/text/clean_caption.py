"""Captions of the web made plain, as those were that PixArt was trained with.

Source: diffusers' `clean_caption`, after DeepFloyd IF's; the rules and their order are its.
"""

from __future__ import annotations

import html
import re
import warnings
from urllib.parse import unquote_plus

from fluxjax.config import ConfigError

_FILES = "(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)"
_SITE = r"[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
_DASHES = (
    "\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0"
    "\ufe31\ufe32\ufe58\ufe63\uff0d"
)
_Rules = tuple[tuple[str, str], ...]

_ADDRESSES: _Rules = tuple(
    (rf"\b(?:{scheme}:(?:/{{1,3}}|[a-zA-Z0-9%])|{_SITE})", "") for scheme in ("https?", "www")
)
_MARKS: _Rules = (
    (r"@\w+\b", ""),  # names of users
    ("[\u31c0-\u9fff]+", ""),  # strokes and ideographs
    (f"[{_DASHES}]+", "-"),
    ("[`´«»“”¨]", '"'),
    ("[‘’]", "'"),
    ("&quot;?", ""),
    ("&amp", ""),
    (r"\d{1,3}(?:\.\d{1,3}){3}", " "),  # addresses of machines
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.{_FILES}", ""),
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~)(\]\[}{|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)
_CODES_AND_OFFERS: _Rules = (
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b{_FILES}(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # sizes, with a Cyrillic x too
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
)
_ENDS: _Rules = (
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)
_WORD_JOINTS = re.compile("[-_]")
_MOST_JOINTS = 3


def clean_caption(caption: str) -> str:
    """The caption in small letters, without addresses, markup, file names, codes, offers and marks.

    It is cleaned twice, as diffusers does. Raises ConfigError where a library is missing.
    """
    return _cleaned(_cleaned(caption))


def _cleaned(caption: str) -> str:
    try:
        from bs4 import BeautifulSoup, MarkupResemblesLocatorWarning
        from ftfy import fix_text
    except ImportError as error:
        raise ConfigError(
            f"clean_caption needs {error.name}: pip install beautifulsoup4 ftfy (the extra "
            "captions), or leave it out"
        ) from None
    text = unquote_plus(caption).strip().lower().replace("<person>", "person")
    text = _ruled(text, _ADDRESSES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MarkupResemblesLocatorWarning)
        text = BeautifulSoup(text, features="html.parser").text
    text = _ruled(text, _MARKS)
    if len(_WORD_JOINTS.findall(text)) > _MOST_JOINTS:
        text = _WORD_JOINTS.sub(" ", text)
    text = html.unescape(html.unescape(fix_text(text)))
    return _ruled(_ruled(text, _CODES_AND_OFFERS), _ENDS).strip()


def _ruled(text: str, rules: _Rules) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text
