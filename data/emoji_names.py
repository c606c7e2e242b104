"""Fills in the short names and the plurals of `emoji_scenes.json`; run once after a change of its emoji or nouns.

`pip install emoji inflect && python -m regard.data.emoji_names`, with `emoji` for Unicode's short names (CLDR, English)
and `inflect` for plurals. Neither is needed to draw scenes.
"""

import importlib
import json

from regard.data.emoji_scenes import CATEGORIES_TABLE

# Short names that nobody asks for: no nouns, or the noun of something else.
_NOT_ASKED_FOR = {"bug", "fire", "game die", "high voltage", "hot beverage", "hourglass done", "locked"}
_NOT_ASKED_FOR |= {"snowman without snow"}


def fill_in() -> None:
    """Write the table again, with "name" and "names" by "emoji" and "noun"."""
    emoji, plural = importlib.import_module("emoji"), importlib.import_module("inflect").engine().plural_noun
    rows = json.loads(CATEGORIES_TABLE.read_text("utf-8"))
    for row in rows:
        row["name"] = emoji.EMOJI_DATA[row["emoji"]]["en"].strip(":").replace("_", " ")
        asked_for = [name for name in (row["name"], row["noun"]) if name not in _NOT_ASKED_FOR]
        row["names"] = [*dict.fromkeys(form for name in asked_for for form in (name, plural(name)))]
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    CATEGORIES_TABLE.write_text(f"[\n{lines}\n]\n", "utf-8")


if __name__ == "__main__":
    fill_in()
