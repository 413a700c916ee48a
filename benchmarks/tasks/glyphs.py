# SPDX-License-Identifier: Apache-2.0
"""A classification task made on the fly: each of 3x32x32 shows one of 16 letters among clutter.

Same seed, same bytes, on any machine: only the four operations, square roots and whole numbers touch the pixels.
"""

from dataclasses import dataclass
from typing import cast

import numpy as np

SIDE = 32
# Images are made a block at a time, each block from its own seed: a longer set begins with the shorter one.
BLOCK = 256
CLUTTER = 3

# Corner points on a 3 x 3 board, row by row from the top left: 012 / 345 / 678. A letter is strokes between them.
LETTERS = {
    "L": "06 68",
    "T": "02 17",
    "V": "07 72",
    "X": "08 26",
    "Z": "02 26 68",
    "N": "60 08 82",
    "H": "06 28 35",
    "E": "02 06 34 68",
    "F": "02 06 34",
    "K": "06 32 38",
    "Y": "04 24 47",
    "A": "61 18 35",
    "U": "06 68 82",
    "P": "06 02 25 53",
    "M": "60 04 42 28",
    "D": "06 01 15 57 76",
}
CLASSES = tuple(LETTERS)


def letter_images(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (count, 3, 32, 32) in uint8 and their labels, as many of each class in every block.

    >>> images, labels = letter_images(2, seed=0)
    >>> images.shape, images.dtype, len(CLASSES)
    ((2, 3, 32, 32), dtype('uint8'), 16)
    """
    blocks = [_block(seed, number) for number in range(-(-count // BLOCK))]
    images, labels = (np.concatenate(parts)[:count] for parts in zip(*blocks, strict=True))
    return images, labels


@dataclass(frozen=True, kw_only=True)
class _Dice:
    """Random float32 numbers of one block, one set of values for each image."""

    generator: np.random.Generator

    def between(self, low: float, high: float, *shape: int) -> np.ndarray:
        uniform = self.generator.random((BLOCK, *shape), dtype=np.float32)
        return np.float32(low) + np.float32(high - low) * uniform


def _block(seed: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.Generator(np.random.PCG64([seed, number]))
    dice = _Dice(generator=generator)
    labels = generator.permutation(np.arange(BLOCK) % len(CLASSES))
    paint = dice.between(40, 215, 3, 1, 1)
    picture = paint + _texture(dice, 34.0)
    for _ in range(CLUTTER):
        picture = _over(picture, dice.between(0, 255, 3, 1, 1), _ink(_scratch(dice), dice.between(0.4, 1.3)))
    # The letter differs from the ground by a little or by much, in any direction of colour.
    direction = dice.between(-1, 1, 3, 1, 1)
    length = np.sqrt(_sum_of_squares(direction))
    colour = paint + direction / (length + np.float32(1e-3)) * dice.between(45, 170, 1, 1, 1)
    picture = _over(picture, colour, _ink(_strokes(dice, labels), dice.between(0.7, 1.7)))
    picture = _covered(dice, picture)
    grain = sum(generator.integers(-128, 128, picture.shape, dtype=np.int16) for _ in range(2))
    picture = picture + cast(np.ndarray, grain).astype(np.float32) * dice.between(0.02, 0.24, 1, 1, 1)
    return np.clip(np.floor(picture), 0, 255).astype(np.uint8), labels


def _sum_of_squares(direction: np.ndarray) -> np.ndarray:
    red, green, blue = (direction[:, channel : channel + 1] for channel in range(3))
    return red * red + green * green + blue * blue


def _grid() -> tuple[np.ndarray, np.ndarray]:
    """Coordinates x and y of the pixels, from -1 to 1, as images of one channel."""
    line = (np.arange(SIDE, dtype=np.float32) - np.float32(SIDE / 2 - 0.5)) / np.float32(SIDE / 2)
    return line[None, None, None, :], line[None, None, :, None]


def _texture(dice: _Dice, strength: float) -> np.ndarray:
    """A slope and two triangle waves of random direction, pitch and colour."""
    x, y = _grid()
    total = x * dice.between(-strength, strength, 3, 1, 1) + y * dice.between(-strength, strength, 3, 1, 1)
    for _ in range(2):
        phase = x * dice.between(-3, 3, 1, 1, 1) + y * dice.between(-3, 3, 1, 1, 1) + dice.between(0, 1, 1, 1, 1)
        wave = np.abs(phase - np.floor(phase) - np.float32(0.5)) - np.float32(0.25)
        total = total + wave * dice.between(-2 * strength, 2 * strength, 3, 1, 1)
    return total


def _strokes(dice: _Dice, labels: np.ndarray) -> np.ndarray:
    """Ends of the strokes of each image's letter, (images, strokes, 2 ends, 2), in a random pose."""
    most = max(len(strokes.split()) for strokes in LETTERS.values())
    board = np.zeros((len(CLASSES), most, 2, 2), dtype=np.float32)
    for row, strokes in zip(board, LETTERS.values(), strict=True):
        ends = [[((int(p) % 3) - 1, (int(p) // 3) - 1) for p in stroke] for stroke in strokes.split()]
        row[:] = ends + ends[-1:] * (most - len(ends))
    points = board[labels] + dice.between(-0.14, 0.14, most, 2, 2)
    x = points[..., 0] * dice.between(0.3, 0.62, 1, 1)
    y = points[..., 1] * dice.between(0.42, 0.68, 1, 1)
    # The turn is by the angle whose half has this tangent: up to 21 degrees, without sines.
    half = dice.between(-0.19, 0.19, 1, 1)
    scale = 1 / (1 + half * half)
    cosine, sine = (1 - half * half) * scale, 2 * half * scale
    lean = dice.between(-0.25, 0.25, 1, 1)
    x = x + lean * y
    turned = np.stack([x * cosine - y * sine, x * sine + y * cosine], axis=-1)
    return turned + dice.between(-0.28, 0.28, 1, 1, 2)


def _scratch(dice: _Dice) -> np.ndarray:
    """One short stroke anywhere: what lies about."""
    middle = dice.between(-1, 1, 1, 1, 2)
    reach = dice.between(-0.4, 0.4, 1, 1, 2)
    return np.concatenate([middle - reach, middle + reach], axis=2)


def _ink(strokes: np.ndarray, half_width: np.ndarray) -> np.ndarray:
    """How much of each pixel the strokes cover, 0 to 1; half the pen's width in pixels."""
    x, y = (line[:, 0] for line in _grid())
    nearest = np.full((len(strokes), SIDE, SIDE), np.float32(100))
    for stroke in range(strokes.shape[1]):
        (ax, ay), (bx, by) = (
            (strokes[:, stroke, end, 0, None, None], strokes[:, stroke, end, 1, None, None]) for end in (0, 1)
        )
        dx, dy = bx - ax, by - ay
        along = ((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy + np.float32(1e-6))
        along = np.clip(along, 0, 1)
        off_x, off_y = x - ax - along * dx, y - ay - along * dy
        nearest = np.minimum(nearest, off_x * off_x + off_y * off_y)
    pixels = np.sqrt(nearest) * np.float32(SIDE / 2)
    return np.clip(half_width[:, None, None] + np.float32(0.5) - pixels, 0, 1)[:, None]


def _over(picture: np.ndarray, colour: np.ndarray, cover: np.ndarray) -> np.ndarray:
    return picture + (colour - picture) * cover


def _covered(dice: _Dice, picture: np.ndarray) -> np.ndarray:
    """Half of the images have a plain patch over a corner or the middle, up to a quarter of the side wide."""
    x, y = _grid()
    left, top = dice.between(-0.9, 0.7, 1, 1, 1), dice.between(-0.9, 0.7, 1, 1, 1)
    wide, high = dice.between(-0.5, 0.5, 1, 1, 1), dice.between(-0.5, 0.5, 1, 1, 1)
    inside = (x > left) & (x < left + wide) & (y > top) & (y < top + high)
    return _over(picture, dice.between(0, 255, 3, 1, 1), inside.astype(np.float32))
