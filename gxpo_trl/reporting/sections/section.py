"""A section of the page."""

from dataclasses import dataclass, field

from ..figures import Picture
from ..tables import Table


@dataclass(frozen=True)
class Section:
    """A heading and its content.

    Attributes:
        title (`str`): The heading.
        notes (`list[str]`): Sentences, such as what is missing.
        tables (`list[Table]`), pictures (`list[Picture]`): In order.
        samples (`list[dict[str, str]]`): Completions, with `title`, `prompt`, `completion` and `score`.
    """

    title: str
    notes: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    samples: list[dict[str, str]] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        return not (self.notes or self.tables or self.pictures or self.samples)
