"""Take a picture of the top of any page that this package writes, in a headless Chromium.

    alphaedit report docs/data/results.json --title "Six editors" --html report.html
    python docs/figures/picture_html.py report.html docs/images/report.png --height 800

    alphaedit show counterfact records.json --model MODEL --pack pack --html record.html
    python docs/figures/picture_html.py record.html docs/images/record.png --height 1130

The browser is the one that ``picture_page.py`` finds.
"""

import argparse
from pathlib import Path

from picture_page import picture

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path, help="HTML file")
    parser.add_argument("out", type=Path, help="PNG to write")
    parser.add_argument("--width", type=int, default=1100)
    parser.add_argument("--height", type=int, default=1000)
    given = parser.parse_args()
    if not given.page.is_file():
        raise SystemExit(f"{given.page} is no file; write one with --html")
    picture(given.page, given.out, given.width, given.height)
