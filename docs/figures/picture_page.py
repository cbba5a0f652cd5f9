"""Take a picture of a pack's page in a headless Chromium.

    alphaedit demo --out demo
    python docs/figures/picture_page.py demo/pack docs/images/page.png --null-space demo/null_space

``alphaedit inspect PACK --html PAGE.html`` writes the page itself.
"""

import argparse
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from alphaedit_peft import EditPack, NullSpace
from alphaedit_peft.report import pack_page


def picture(page: Path, out: Path, width: int, height: int) -> None:
    """Write a PNG of the top of a page, width x height."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), "")
    if not browser:
        raise SystemExit("there is no chromium here; install it, or open the page yourself")
    command = [browser, "--headless=new", "--disable-gpu", "--hide-scrollbars"]
    command += ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's sandbox refuses root
    command += [f"--window-size={width},{height}", f"--screenshot={out.resolve()}"]
    subprocess.run([*command, page.resolve().as_uri()], check=True, capture_output=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pack", help="folder or Hub id")
    parser.add_argument("out", type=Path, help="PNG to write")
    parser.add_argument("--null-space", help="the one that the pack was made with")
    parser.add_argument("--width", type=int, default=1100)
    parser.add_argument("--height", type=int, default=1000)
    given = parser.parse_args()
    pack = EditPack.from_pretrained(given.pack)
    space = NullSpace.from_pretrained(given.null_space) if given.null_space else None
    with tempfile.TemporaryDirectory() as place:
        page = Path(place) / "page.html"
        page.write_text(pack_page(pack, space), encoding="utf-8")
        picture(page, given.out, given.width, given.height)
