"""The recipes that come with the package: lists them, prints one, copies them all.

    gxpo recipes                       # a list
    gxpo recipes tiny/gxpo.yaml        # one of them, printed
    gxpo recipes --copy recipes        # all of them, copied into a folder to edit

`--config gxpo:tiny/gxpo.yaml` uses one of these recipes, in every command that takes a recipe.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

from ..spelling import nearest


PACKAGE = Path(__file__).parents[1]
PREFIX = "gxpo:"


def recipes_folder() -> Path:
    """`gxpo_trl/recipes` of an installed package, `recipes` of a clone."""
    installed = PACKAGE / "recipes"
    return installed if installed.is_dir() else PACKAGE.parent / "recipes"


def recipe_names() -> list[str]:
    """The training recipes, as `<folder>/<name>.yaml`."""
    folder = recipes_folder()
    found = [path.relative_to(folder).as_posix() for path in folder.glob("*/*.yaml")]
    return sorted(name for name in found if not name.startswith(("accelerate/", "eval/")))


def recipe_path(name: str) -> Path:
    """The file of a recipe of the package.

    Args:
        name (`str`): Such as `gxpo:tiny/gxpo.yaml` or `gxpo:eval/gxpo.yaml`; any other is a path already.

    Raises:
        ValueError: If there is none of that name; it names the nearest.
    """
    if not name.startswith(PREFIX):
        return Path(name)
    folder, relative = recipes_folder(), name.removeprefix(PREFIX)
    path = folder / relative
    if not (path.suffix == ".yaml" and path.is_file()):
        names = [found.relative_to(folder).as_posix() for found in folder.glob("*/*.yaml")]
        raise ValueError(f"There is no recipe `{name}`{nearest(relative, names)} `gxpo recipes` lists them.")
    return path


def main(arguments: list[str] | None = None, prog: str | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("name", nargs="?", help="a recipe to print, such as tiny/gxpo.yaml")
    parser.add_argument("--copy", type=Path, metavar="FOLDER", help="a folder that does not exist yet")
    options = parser.parse_args(arguments)
    try:
        if options.copy is not None:
            if options.copy.exists():
                raise ValueError(f"`--copy {options.copy}` exists already. Name a folder that does not exist yet.")
            shutil.copytree(recipes_folder(), options.copy)
            print(f"Copied to {options.copy}.")
        elif options.name is not None:
            path = recipe_path(PREFIX + options.name.removeprefix(PREFIX))
            print(path.read_text(encoding="utf-8"), end="")
        else:
            names = recipe_names()
            width = max(map(len, names))
            for name in names:
                first_line = (recipes_folder() / name).read_text(encoding="utf-8").partition("\n")[0]
                print(f"{PREFIX}{name:<{width}}  {first_line.removeprefix('#').strip()}")
    except BrokenPipeError:  # `gxpo recipes | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
