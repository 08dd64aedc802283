"""The command line: `python -m docs.generate readme|site`."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import notebooks, readme, site


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m docs.generate")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("readme", help="write README's numbers and figure, and the notebook of examples/")
    folder = commands.add_parser("site", help="write the sources of the docs site").add_argument
    folder("folder", type=Path)
    args = parser.parse_args()
    if args.command == "readme":
        for path in [*readme.write(), *notebooks.write()]:
            print(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
    else:
        print(f"{site.write(args.folder)} pages in {args.folder}")


if __name__ == "__main__":
    main()
