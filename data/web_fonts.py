"""Fetches the fonts of `rendered_text_fonts.json` that Debian does not package.

    python -m regard.data.web_fonts [FOLDER]

They are web fonts that npm's registry holds under @fontsource, each archive with the checksum that the table pins, and
only ever trained with. When the table was made, those were left out whose letters look like those of a validation or
test font (mean overlap, scaled to one box, of 0.89 and more; clones have 0.91 and more), and those without small
letters.
"""

import argparse
import base64
import hashlib
import io
import json
import os
import sys
import tarfile
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from regard.data.rendered_text import FONTS_TABLE

REGISTRY = "https://registry.npmjs.org"
FOLDER = "~/.local/share/fonts/regard"  # among those that `RenderedTextDataset` searches


def fetch(row: dict[str, Any], folder: Path, registry: str = REGISTRY) -> None:
    """Write the fonts of one package, unless they are there.

    Args:
        row: of the table; `package` is `@scope/name@version`.
        folder: where to write TrueType files.
        registry: address of the registry.

    Raises:
        OSError: it cannot be reached, or the archive lacks a font.
        ValueError: the archive is not the one that the table knows.
    """
    from fontTools.ttLib import TTFont

    missing = [name for name in row["files"] if not (folder / name).is_file()]
    if not missing:
        return
    name, _, version = row["package"].rpartition("@")
    address = f"{registry}/{name}/-/{name.rpartition('/')[2]}-{version}.tgz"
    with urllib.request.urlopen(address, timeout=60) as response:
        archive = response.read()
    algorithm, _, expected = row["integrity"].partition("-")
    if base64.b64encode(hashlib.new(algorithm, archive).digest()).decode() != expected:
        raise ValueError(f"{address}: the checksum is not the table's; the archive is damaged, or not the same")
    with tarfile.open(fileobj=io.BytesIO(archive)) as members:
        for file in missing:
            try:
                member = members.extractfile(f"package/files/{Path(file).stem}.woff")
            except KeyError:
                member = None
            if member is None:
                raise OSError(f"{address} does not hold {Path(file).stem}.woff")
            font = TTFont(io.BytesIO(member.read()), recalcTimestamp=False)
            font.flavor = None  # uncompressed, for it is opened in many sizes
            unfinished = folder / f".{file}"
            font.save(unfinished)
            os.replace(unfinished, folder / file)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m regard.data.web_fonts", description="Fetch the web fonts that ImageTextSlot is trained with."
    )
    parser.add_argument("folder", nargs="?", default=FOLDER, help="where to put them (default: %(default)s)")
    parser.add_argument("--registry", default=REGISTRY, help="npm's registry, or a mirror of it (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        import fontTools.ttLib  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError:
        print("fontTools is missing, which unpacks web fonts: pip install fonttools", file=sys.stderr)
        return 1
    folder = Path(options.folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for row in json.loads(FONTS_TABLE.read_text("utf-8")) if "integrity" in row]

    def attempt(row: dict[str, Any]) -> str | None:
        try:
            fetch(row, folder, options.registry)
        except (OSError, ValueError) as error:
            return f"{row['package']}: {error}"
        return None

    with ThreadPoolExecutor(4) as pool:
        attempts = tqdm(pool.map(attempt, rows), total=len(rows), unit="family")
        failures = [failure for failure in attempts if failure]
    for failure in failures:
        print(failure, file=sys.stderr)
    print(f"{len(rows) - len(failures)} of {len(rows)} families are in {folder}")
    if failures:
        print("The same command tries the others again.", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
