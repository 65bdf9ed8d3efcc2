"""The nearest known word to an unknown one."""

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown word: `; did you mean …?` if one is close, otherwise a full stop."""
    by_lower_case = {name.lower(): name for name in known}
    matches = difflib.get_close_matches(word.lower(), by_lower_case, n=1)
    return f"; did you mean `{by_lower_case[matches[0]]}`?" if matches else "."
