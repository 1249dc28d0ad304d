"""Put Colab badges beside the notebooks in both READMEs, for the place on GitHub where this folder is public.

    python docs/badges.py OWNER/NAME

Run again with another place, it changes the badges.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
LINK = re.compile(r"(\[[^]]+\]\((notebooks/\w+\.ipynb)\))( \[!\[Open in Colab\].*?\)\]\(.*?\))?")


def with_badges(page: str, repository: str) -> str:
    opened = f"https://colab.research.google.com/github/{repository}/blob/main"
    return LINK.sub(lambda link: f"{link[1]} {BADGE}({opened}/{link[2]})", page)


def main() -> None:
    repository = sys.argv[1] if len(sys.argv) == 2 else ""
    if not re.fullmatch(r"[\w-]+/[\w.-]+", repository):
        sys.exit("say where this folder is public on GitHub: make badges REPOSITORY=owner/name")
    for name in ("README.md", "README.zh-CN.md"):
        page = ROOT / name
        page.write_text(with_badges(page.read_text(encoding="utf-8"), repository), encoding="utf-8")


if __name__ == "__main__":
    main()
