"""Classification from folders: ``root/SPLIT/CLASS/NAME.jpg``; classes are the folder names, sorted."""

from __future__ import annotations

from segdeconv.config import DataConfig
from segdeconv.data.samples import Samples, even_palette, folder
from segdeconv.errors import UserError
from segdeconv.images import Picture, list_images, read_rgb, resize_image


class ImageFolder(Samples):
    """See the file's header. ``data.classes``, where given, must be the folder names; it fixes the order."""

    task = "classification"

    def __init__(self, config: DataConfig, split: str) -> None:
        self.config = config
        self.same_size = config.size is not None
        root = folder(config, split)
        found = tuple(sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")))
        if not found:
            raise UserError(f"{root}: holds no class folder")
        if config.classes is not None and set(config.classes) != set(found):
            odd = sorted(set(config.classes) ^ set(found))[0]
            raise UserError(f"{root}: data.classes and the class folders differ, first in {odd!r}")
        self.classes = config.classes or found
        self.palette = config.palette or even_palette(len(self.classes))
        self.items, problems = [], []
        for label, name in enumerate(self.classes):
            pictures, wrong = list_images(root / name)
            self.items += [(path, label) for path in pictures]
            problems += wrong
        self.problems = problems

    def __len__(self) -> int:
        return len(self.items)

    def name(self, index: int) -> str:
        path, _ = self.items[index]
        return f"{path.parent.name}/{path.stem}"

    def load(self, index: int) -> tuple[Picture, int]:
        path, label = self.items[index]
        return resize_image(read_rgb(path), self.config.size), label
