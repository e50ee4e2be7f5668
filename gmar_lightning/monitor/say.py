"""Sentences for the console, each said once however often its cause returns."""

from __future__ import annotations

import re
from collections.abc import Callable


def without_folders(text: str) -> str:
    """The text with absolute paths shortened to their last part: a record may be shown to strangers."""
    return re.sub(r"(?<![\w.])(?:[A-Za-z]:)?[/\\](?:[^\s/\\'\":;,]+[/\\])+", ".../", text)


class SayOnce:
    """Passes a sentence on unless that was said before.

    Args:
        warn: Says a sentence on the console.
    """

    def __init__(self, warn: Callable[[str], None] = print) -> None:
        self._warn, self._said = warn, set[str]()

    def __call__(self, sentence: str, key: str | None = None) -> None:
        """Say `sentence`; `key` stands for sentences that differ in detail only."""
        if (key or sentence) not in self._said:
            self._said.add(key or sentence)
            self._warn(sentence)
