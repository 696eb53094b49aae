"""Two sets of pictures from what is installed: words in matplotlib's typefaces, patches of scikit-learn's two photos.

Written as image folders: `out/three_datasets/typefaces/<typeface>/*.png` and `out/three_datasets/photos/<photo>/*.png`.
"""

from __future__ import annotations

import random
from pathlib import Path

import matplotlib
import sklearn.datasets
from PIL import Image, ImageDraw, ImageFont

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
TYPEFACES = {
    "sans": "DejaVuSans.ttf",
    "serif": "DejaVuSerif.ttf",
    "mono": "DejaVuSansMono.ttf",
    "times": "STIXGeneral.ttf",
    "computer modern": "cmr10.ttf",
}
PHOTOS = {"temple": "china.jpg", "flower": "flower.jpg"}
WORDS = ("river", "stone", "cloud", "amber", "violet", "maple", "ember", "willow", "harbor", "meadow", "copper")
SIZE, PER_LABEL = 64, {"typefaces": 100, "photos": 120}


def word(draw: random.Random, font: str) -> Image.Image:
    """A word, somewhere, in some size and grey, on a light ground."""
    image = Image.new("RGB", (SIZE, SIZE), (draw.randrange(200, 256),) * 3)
    face = ImageFont.truetype(str(FONTS / font), draw.randrange(14, 22))
    place = draw.randrange(-2, 6), draw.randrange(4, SIZE - 28)
    ImageDraw.Draw(image).text(place, draw.choice(WORDS), font=face, fill=(draw.randrange(0, 90),) * 3)
    return image


def patch(draw: random.Random, photo: Image.Image) -> Image.Image:
    left, top = draw.randrange(photo.width - SIZE), draw.randrange(photo.height - SIZE)
    return photo.crop((left, top, left + SIZE, top + SIZE))


def main() -> None:
    draw, out = random.Random(0), Path("out/three_datasets")
    photos = Path(sklearn.datasets.__file__).parent / "images"
    made = {("typefaces", label): lambda font=font: word(draw, font) for label, font in TYPEFACES.items()}
    for label, name in PHOTOS.items():
        photo = Image.open(photos / name).convert("RGB")
        made["photos", label] = lambda photo=photo: patch(draw, photo)
    for (kind, label), make in made.items():
        folder = out / kind / label
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(PER_LABEL[kind]):
            make().save(folder / f"{i:03}.png")


if __name__ == "__main__":
    main()
