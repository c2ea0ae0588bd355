"""The embedded data set: street scenes drawn by this file, with exact labels. No download, no files.

A pinhole camera 1.5 m above a straight road looks at pavement, buildings, trees, poles, parked and driving
cars and people, drawn far to near. Colours are drawn so that classes share them (grey roads, walls, cars and
skies; people and cars of any colour), and texture, shadows, haze, lighting, blur and sensor noise vary:
a classifier that sees only a pixel's colour fails. Each scene is fixed by its seed.

Classes and colours are those of the Cityscapes train classes it uses.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

from segdeconv.config import DataConfig
from segdeconv.data.samples import Samples
from segdeconv.errors import UserError
from segdeconv.images import Color, Picture

CLASSES: dict[str, Color] = {
    "road": (128, 64, 128),
    "sidewalk": (244, 35, 232),
    "building": (70, 70, 70),
    "pole": (153, 153, 153),
    "vegetation": (107, 142, 35),
    "sky": (70, 130, 180),
    "person": (220, 20, 60),
    "car": (0, 0, 142),
}
ROAD, SIDEWALK, BUILDING, POLE, VEGETATION, SKY, PERSON, CAR = range(len(CLASSES))

DEFAULT_SIZE = (128, 256)
_CAMERA_HEIGHT = 1.5  # metres
_FIRST_VAL_SEED = 1_000_000

Floats = NDArray[np.float32]
Draw = Callable[[float], None]  # paints an object at this distance in metres


class ToyStreet(Samples):
    """``data.count`` drawn scenes of ``data.size`` (128x256 by default); the splits never share a seed."""

    classes = tuple(CLASSES)
    palette = tuple(CLASSES.values())
    same_size = True

    def __init__(self, config: DataConfig, split: str) -> None:
        self.size = config.size or DEFAULT_SIZE
        if split not in ("train", "val"):
            raise UserError(f"the data set toy has no split {split}; its splits are train and val")
        train = split == "train"
        self.count = config.count[0 if train else 1]
        self.first = 0 if train else _FIRST_VAL_SEED

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"{self.first + index:07d}"

    def load(self, index: int) -> tuple[Picture, Picture]:
        return draw_street(self.first + index, self.size)


def draw_street(seed: int, size: tuple[int, int] = DEFAULT_SIZE) -> tuple[Picture, Picture]:
    """Scene ``seed`` at ``size`` (height, width): RGB (H, W, 3) uint8 and labels (H, W) uint8."""
    scene = _Scene(np.random.default_rng(seed), *size)
    scene.sky()
    scene.ground()
    objects = [*scene.plan_sides(), *scene.plan_cars(), *scene.plan_people()]
    for z, draw in sorted(objects, key=lambda item: -item[0]):
        draw(z)
    return scene.photograph(), scene.label


class _Scene:
    def __init__(self, rng: np.random.Generator, height: int, width: int) -> None:
        self.rng, self.height, self.width = rng, height, width
        self.image = np.zeros((height, width, 3), np.float32)
        self.label = np.full((height, width), SKY, np.uint8)
        self.depth = np.full((height, width), 1e3, np.float32)
        self.focal = width * rng.uniform(0.5, 0.75)
        self.vanish_x = width * rng.uniform(0.3, 0.7)
        self.horizon = height * rng.uniform(0.36, 0.52)
        self.half_road = rng.uniform(3.0, 5.5)
        self.kerb = self.half_road + rng.uniform(1.5, 3.5)  # where the pavement ends
        self.light = rng.uniform(-1, 1)  # which side the sun is on

    # ---- colour and texture ----

    def colour(self, low: float, high: float, saturation: float) -> Floats:
        """A random colour (0 to 255) of bounded saturation."""
        grey = self.rng.uniform(low, high)
        tint = self.rng.uniform(-1, 1, 3) * saturation * grey
        return np.clip(grey + tint, 5, 250).astype(np.float32)

    def noise(self, scale: float, stretch: float = 1.0) -> Floats:
        """Smooth noise (H, W) in about -1 to 1, with features of ``scale`` pixels."""
        shape = (max(2, round(self.height / scale)), max(2, round(self.width / scale / stretch)))
        small = self.rng.standard_normal(shape).astype(np.float32)
        large = cv2.resize(small, (self.width, self.height), interpolation=cv2.INTER_CUBIC)
        return np.asarray(large, np.float32)

    def grain(self, strength: float, *scales: float) -> Floats:
        """Texture (H, W, 1) of several scales, to be added to a colour."""
        texture = np.sum([self.noise(scale) for scale in scales], axis=0)[..., None]
        return np.asarray(strength * texture, np.float32)

    def paint(self, mask: NDArray[np.uint8], colour: Floats, label: int, z: float | Floats) -> None:
        """``colour`` is (3,) or (H, W, 3)."""
        where = mask > 0
        self.image[where] = colour if colour.ndim == 1 else colour[where]
        self.label[where] = label
        self.depth[where] = z if np.isscalar(z) else z[where]  # type: ignore[index]

    def polygon(self, points: list[tuple[float, float]]) -> NDArray[np.uint8]:
        mask = np.zeros((self.height, self.width), np.uint8)
        cv2.fillPoly(mask, [np.round(points).astype(np.int32)], 1)
        return mask

    def stain(self, points: list[tuple[float, float]], colour: Floats) -> None:
        """Detail inside an object: changes colour, not label."""
        cv2.fillPoly(self.image, [np.round(points).astype(np.int32)], [float(c) for c in colour])

    def project(self, x: float, y: float, z: float) -> tuple[float, float]:
        """Metres right of the road's middle, above ground, and ahead, to pixels."""
        scale = self.focal / z
        return self.vanish_x + x * scale, self.horizon + (_CAMERA_HEIGHT - y) * scale

    # ---- the scene ----

    def sky(self) -> None:
        kind = self.rng.integers(4)
        top = [self.colour(90, 170, 0.1), np.array([70, 120, 200]), self.colour(150, 235, 0.05),
               np.array([90, 80, 110])][kind]  # fmt: skip
        low = [self.colour(150, 220, 0.1), np.array([190, 210, 235]), self.colour(170, 240, 0.05),
               np.array([230, 160, 110])][kind]  # fmt: skip
        t = np.clip(np.arange(self.height) / self.horizon, 0, 1)[:, None, None]
        sky = (1 - t) * top + t * low + np.zeros_like(self.image)
        clouds = np.clip(self.noise(self.height / 5, 2.5) + 0.4 * self.noise(self.height / 14, 2), 0, 1.5)
        sky = sky + self.rng.uniform(0, 60) * clouds[..., None]
        self.image[:] = sky + self.grain(self.rng.uniform(0, 4), 3)
        self.haze_colour = np.asarray(low, np.float32)

    def ground(self) -> None:
        rows = np.arange(self.height, dtype=np.float32)[:, None]
        z = self.focal * _CAMERA_HEIGHT / np.maximum(rows - self.horizon, 0.5)
        z = np.broadcast_to(z, self.label.shape)
        columns = np.arange(self.width, dtype=np.float32)[None]
        x = (columns - self.vanish_x) * z / self.focal
        below = (rows > self.horizon) & (z < 400)

        base, stone = self.colour(60, 150, 0.08), self.colour(70, 190, 0.18)
        road = base + self.grain(self.rng.uniform(3, 12), 2, 6) + self.grain(self.rng.uniform(0, 10), 30)
        wear = np.cos(x / self.half_road * 2 * np.pi) * self.rng.uniform(-8, 8)  # wheel tracks
        self.paint((below & (np.abs(x) <= self.half_road)).astype(np.uint8), road + wear[..., None], ROAD, z)
        tile = self.rng.uniform(0.5, 1.2)
        joints = ((np.mod(x, tile) < 0.12 * tile) | (np.mod(z, tile) < 0.12 * tile)) & (z < 18)
        walk = stone + self.grain(self.rng.uniform(2, 9), 2, 5) - self.rng.uniform(0, 35) * joints[..., None]
        side = below & (np.abs(x) > self.half_road)
        self.paint(side.astype(np.uint8), walk, SIDEWALK, z)
        rim = below & (np.abs(np.abs(x) - self.half_road - 0.1) < 0.1)
        self.image[rim] += self.rng.uniform(-40, 50)

        if self.rng.random() < 0.75:  # markings
            paint = self.colour(170, 240, 0.05)
            dash = self.rng.uniform(2, 5)
            lines = [0.0, self.half_road * 0.92, -self.half_road * 0.92][: self.rng.integers(1, 4)]
            for offset in lines:
                on = below & (np.abs(x - offset) < 0.09) & (z < 60)
                if offset == 0:
                    on &= np.mod(z, 2 * dash) < dash
                self.image[on] = 0.25 * self.image[on] + 0.75 * paint
        if self.rng.random() < 0.25:  # a crossing
            at = self.rng.uniform(5, 14)
            on = below & (z > at) & (z < at + 3) & (np.abs(x) < self.half_road) & (np.mod(x, 1.0) < 0.5)
            self.image[on] = 0.3 * self.image[on] + 0.7 * self.colour(180, 240, 0.03)
        if self.rng.random() < 0.6:  # shadows of what is not in the picture
            dark = np.clip(self.noise(self.height / 6, 2), 0, 1)[..., None] * self.rng.uniform(0.2, 0.5)
            self.image[below] *= (1 - dark)[below]

    def plan_sides(self) -> list[tuple[float, Draw]]:
        items = []
        for side in (-1, 1):
            z = self.rng.uniform(3, 8)
            while z < 90:  # facades, with gaps
                length = self.rng.uniform(6, 20)
                if self.rng.random() < 0.8:
                    items.append((z + 0.02, self.facade(side, length)))
                else:
                    items.append((z + length / 2, self.hedge(side, length)))
                z += length + (self.rng.uniform(1, 8) if self.rng.random() < 0.3 else 0)
            z = self.rng.uniform(5, 14)
            trees = self.rng.random() < 0.7
            while z < 60 and trees:
                items.append((z, self.tree(side)))
                z += self.rng.uniform(5, 20)
            z = self.rng.uniform(4, 20)
            while z < 50:
                items.append((z, self.pole(side)))
                z += self.rng.uniform(8, 30)
        return items

    def facade(self, side: int, length: float) -> Draw:
        rng, height = self.rng, self.rng.uniform(4, 18)
        base = self.colour(50, 215, 0.25)
        glass, lit = self.colour(30, 160, 0.3), rng.random() < 0.2
        floor, bay = rng.uniform(2.6, 3.6), rng.uniform(1.5, 3.5)
        x = side * (self.kerb + rng.uniform(0, 3))
        depth_x = x + side * rng.uniform(6, 14)
        texture = self.grain(rng.uniform(2, 8), 2, 8)
        shade = 1 + 0.25 * self.light * side

        def wall(points: list[tuple[float, float]], tone: float, z: float) -> None:
            self.paint(self.polygon(points), np.clip(base * tone + texture, 0, 255), BUILDING, z)

        def draw(z: float) -> None:
            far = z + length
            front = [
                self.project(px, y, z) for px, y in ((x, 0), (depth_x, 0), (depth_x, height), (x, height))
            ]
            flank = [self.project(x, y, pz) for y, pz in ((0, z), (0, far), (height, far), (height, z))]
            wall(flank, shade, (z + far) / 2)
            wall(front, 0.85, z)
            for level in np.arange(0.9, height - 1.6, floor):
                for start in np.arange(0.5, length - 1.0, bay):
                    window = [self.project(x, y, z + s) for y, s in (
                        (level, start), (level, start + 0.5 * bay),
                        (level + 0.5 * floor, start + 0.5 * bay), (level + 0.5 * floor, start))]  # fmt: skip
                    glow = lit and rng.random() < 0.4
                    tone = np.array([250, 220, 150], np.float32) if glow else glass * rng.uniform(0.7, 1.2)
                    self.stain(window, np.clip(tone, 0, 255))
                for start in np.arange(0.6, abs(depth_x - x) - 1.0, bay):
                    px = x + side * start
                    end, top = px + side * 0.5 * bay, level + 0.5 * floor
                    corners = ((px, level), (end, level), (end, top), (px, top))
                    window = [self.project(wx, y, z) for wx, y in corners]
                    self.stain(window, np.clip(glass * rng.uniform(0.7, 1.2), 0, 255))

        return draw

    def leaf_colour(self) -> Floats:
        season = self.rng.integers(4)
        tones = ([60, 95, 40], [85, 110, 60], [140, 105, 45], [95, 90, 80])
        return np.clip(np.array(tones[season]) * self.rng.uniform(0.6, 1.5), 5, 250).astype(np.float32)

    def leaves(self, colour: Floats) -> Floats:
        return np.clip(colour * (1 + self.grain(0.22, 1.5, 4)), 0, 255)

    def blob(self, x: float, y: float, rx: float, ry: float, count: int) -> NDArray[np.uint8]:
        mask = np.zeros((self.height, self.width), np.uint8)
        for _ in range(count):
            centre = (round(x + self.rng.normal(0, 0.45) * rx), round(y + self.rng.normal(0, 0.4) * ry))
            axes = (
                max(1, round(rx * self.rng.uniform(0.3, 0.6))),
                max(1, round(ry * self.rng.uniform(0.3, 0.6))),
            )
            cv2.ellipse(mask, centre, axes, 0, 0, 360, 1, -1)
        return mask

    def hedge(self, side: int, length: float) -> Draw:
        colour, height = self.leaf_colour(), self.rng.uniform(1, 5)

        def draw(z: float) -> None:
            x, y = self.project(side * (self.kerb + length / 4), height / 2, z)
            scale = self.focal / z
            mask = self.blob(x, y, length / 2.5 * scale, height / 1.5 * scale, 14)
            mask[int(min(self.project(0, 0, z)[1], self.height)) :] = 0
            self.paint(mask, self.leaves(colour), VEGETATION, z)

        return draw

    def tree(self, side: int) -> Draw:
        rng = self.rng
        x = side * (self.half_road + rng.uniform(0.6, 1.6))
        trunk, crown, radius = rng.uniform(1.6, 3.2), rng.uniform(2.5, 4.5), rng.uniform(1.2, 2.6)
        colour, bark, girth = self.leaf_colour(), self.colour(40, 110, 0.2), rng.uniform(0.12, 0.25)

        def draw(z: float) -> None:
            scale = self.focal / z
            foot, top = self.project(x, 0, z), self.project(x, trunk + crown / 2, z)
            half = max(0.5, girth * scale)
            self.shadow(x, z, radius)
            self.paint(self.polygon([(foot[0] - half, foot[1]), (foot[0] + half, foot[1]),
                                     (top[0] + half / 2, top[1]), (top[0] - half / 2, top[1])]),
                       bark + self.grain(6, 2), VEGETATION, z)  # fmt: skip
            cx, cy = self.project(x, trunk + crown / 2, z)
            mask = self.blob(cx, cy, radius * scale, crown / 1.6 * scale, 16)
            self.paint(mask, self.leaves(colour), VEGETATION, z)

        return draw

    def pole(self, side: int) -> Draw:
        rng = self.rng
        x, height, half_m = (
            side * (self.half_road + rng.uniform(0.2, 0.6)),
            rng.uniform(3, 7.5),
            rng.uniform(0.05, 0.1),
        )
        colour, arm = self.colour(30, 200, 0.12), rng.uniform(0, 2)

        def draw(z: float) -> None:
            scale = self.focal / z
            half = max(0.5, half_m * scale)
            foot, top = self.project(x, 0, z), self.project(x, height, z)
            end = top[0] - side * arm * scale
            mask = self.polygon([(foot[0] - half, foot[1]), (foot[0] + half, foot[1]),
                                 (top[0] + half, top[1]), (top[0] - half, top[1])])  # fmt: skip
            mask |= self.polygon([(top[0], top[1] - half), (top[0], top[1] + half), (end, top[1] + half),
                                  (end, top[1] - half)])  # fmt: skip
            self.paint(mask, colour, POLE, z)

        return draw

    def shadow(self, x: float, z: float, radius: float) -> None:
        """A soft dark ellipse on the ground; labels do not change."""
        cx, cy = self.project(x, 0, z)
        scale = self.focal / z
        mask = np.zeros((self.height, self.width), np.float32)
        axes = (max(1, round(radius * scale)), max(1, round(0.3 * radius * scale)))
        cv2.ellipse(mask, (round(cx), round(cy)), axes, 0, 0, 360, 1.0, -1)
        mask *= (self.label == ROAD) | (self.label == SIDEWALK)
        self.image *= 1 - 0.5 * mask[..., None]

    def plan_cars(self) -> list[tuple[float, Draw]]:
        rng, items = self.rng, []
        for side in (-1, 1):
            if rng.random() < 0.65:  # parked at the kerb
                z = rng.uniform(4, 12)
                while z < 50:
                    items.append((z, self.car(side * (self.half_road - 1.0))))
                    z += rng.uniform(5, 16)
        for _ in range(rng.integers(0, 4)):
            z = 5 * np.exp(rng.uniform(0, 2.2))
            items.append((z, self.car(rng.choice((-1, 1)) * self.half_road * rng.uniform(0.25, 0.5))))
        return items

    def car(self, x: float) -> Draw:
        rng = self.rng
        width, height, waist = rng.uniform(1.6, 2.0), rng.uniform(1.35, 2.1), rng.uniform(0.75, 0.95)
        colour, glass = self.colour(25, 235, rng.choice((0.05, 0.7))), self.colour(25, 120, 0.15)
        lamp = np.array([200, 30, 30] if rng.random() < 0.6 else [240, 240, 220], np.float32)
        length = rng.uniform(3.6, 4.8)

        def draw(z: float) -> None:
            def quad(
                x0: float, x1: float, y0: float, y1: float, inset: float = 0.0
            ) -> list[tuple[float, float]]:
                return [self.project(px, y, z) for px, y in
                        ((x0, y0), (x1, y0), (x1 - inset, y1), (x0 + inset, y1))]  # fmt: skip

            left, right = x - width / 2, x + width / 2
            self.shadow(x, z, width * 0.75)
            inner = left if x > 0 else right  # the flank the camera sees
            roof = inner + (0.12 * width if x > 0 else -0.12 * width)
            flank = [self.project(px, y, pz) for px, y, pz in (
                (inner, 0.25, z), (inner, 0.25, z + length), (inner, waist, z + length),
                (roof, height, z + 0.7 * length), (roof, height, z), (inner, waist, z))]  # fmt: skip
            body = self.polygon(quad(left, right, 0.25, waist)) | self.polygon(
                quad(left, right, waist, height, 0.12 * width)
            )
            wheels = np.zeros_like(body)
            for wx in (left + 0.12, right - 0.12):
                wheels |= self.polygon(quad(wx - 0.12, wx + 0.12, 0, 0.5))
            side = self.polygon(flank)
            tone = colour * (1 + self.grain(0.02, 3))
            self.paint(side, np.clip(tone * 0.75, 0, 255), CAR, z + 0.1)
            self.paint(wheels, np.array([25, 25, 28], np.float32), CAR, z)
            self.paint(body, np.clip(tone, 0, 255), CAR, z)
            self.stain(quad(left + 0.15, right - 0.15, waist + 0.05, height - 0.12, 0.1 * width), glass)
            for lx in (left + 0.05, right - 0.35):
                self.stain(quad(lx, lx + 0.3, waist - 0.25, waist - 0.1), lamp)
            self.stain(quad(x - 0.25, x + 0.25, 0.4, 0.52), self.colour(180, 230, 0.1))

        return draw

    def plan_people(self) -> list[tuple[float, Draw]]:
        rng, items = self.rng, []
        for _ in range(rng.integers(1, 7)):
            z = 4 * np.exp(rng.uniform(0.2, 2.0))
            if rng.random() < 0.75:
                x = rng.choice((-1, 1)) * rng.uniform(self.half_road + 0.4, self.kerb - 0.2)
            else:
                x = rng.uniform(-self.half_road, self.half_road)
            items.append((z, self.person(x)))
        return items

    def person(self, x: float) -> Draw:
        rng = self.rng
        tall, stride, turn = rng.uniform(1.5, 1.9), rng.uniform(0.05, 0.3), rng.uniform(0.6, 1)
        coat, legs = self.colour(25, 225, 0.6), self.colour(25, 160, 0.4)
        skin = np.array([225, 180, 150], np.float32) * rng.uniform(0.35, 1.05)

        def draw(z: float) -> None:
            scale = self.focal / z
            self.shadow(x, z, 0.4)
            hip, foot = self.project(x, 0.48 * tall, z), self.project(x, 0, z)
            shoulder, head = self.project(x, 0.82 * tall, z), self.project(x, 0.92 * tall, z)
            half = max(0.6, 0.22 * turn * scale)
            lower = np.zeros((self.height, self.width), np.uint8)
            for step in (-stride, stride):
                lower |= self.polygon([(hip[0] - half * 0.7, hip[1]), (hip[0] + half * 0.7, hip[1]),
                                       (foot[0] + step * scale + half * 0.4, foot[1]),
                                       (foot[0] + step * scale - half * 0.4, foot[1])])  # fmt: skip
            waist = half * 0.85
            upper = self.polygon([(shoulder[0] - half, shoulder[1]), (shoulder[0] + half, shoulder[1]),
                                  (hip[0] + waist, hip[1] + 1), (hip[0] - waist, hip[1] + 1)])  # fmt: skip
            face = np.zeros_like(lower)
            radius = max(1, round(0.085 * tall * scale))
            cv2.circle(face, (round(head[0]), round(head[1])), radius, 1, -1)
            self.paint(lower, legs, PERSON, z)
            self.paint(upper, np.clip(coat * (1 + self.grain(0.08, 3)), 0, 255), PERSON, z)
            self.paint(face, np.clip(skin, 5, 255), PERSON, z)

        return draw

    def photograph(self) -> Picture:
        """Haze, light, blur and noise: what the camera makes of the scene."""
        rng, image = self.rng, self.image
        haze = 1 - np.exp(-self.depth / rng.uniform(60, 400))[..., None]
        haze[self.label == SKY] = 0
        image = (1 - haze) * image + haze * self.haze_colour
        slope = np.linspace(-1, 1, self.width, dtype=np.float32)[None, :, None] * self.light
        image = image * (1 + rng.uniform(0, 0.2) * slope) * rng.uniform(0.55, 1.25)
        image = image * rng.uniform(0.88, 1.12, 3)  # white balance
        contrast = rng.uniform(0.7, 1.15)
        image = (image - 128) * contrast + 128
        sigma = rng.uniform(0.3, 1.1) * self.height / 128
        image = cv2.GaussianBlur(image.astype(np.float32), (0, 0), sigma)
        image = image + rng.normal(0, rng.uniform(1, 9), image.shape)
        return np.clip(image, 0, 255).astype(np.uint8)
