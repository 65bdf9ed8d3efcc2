"""Text in pages that a script writes: between `<!-- NAME -->` and `<!-- /NAME -->`, each on a line of its own."""

import re


def fill(page: str, name: str, text: str) -> str:
    """A page whose text between the markers is another.

    Raises:
        ValueError: If the page has not one pair of markers.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    pattern = re.compile(rf"{re.escape(begin)}\n.*?{re.escape(end)}", re.DOTALL)
    if len(pattern.findall(page)) != 1:
        raise ValueError(f"A page needs one {begin} and one {end} after it, each on a line of its own.")
    return pattern.sub(lambda _: f"{begin}\n{text}\n{end}", page)
