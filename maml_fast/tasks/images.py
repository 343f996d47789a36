"""Few-shot classification of images: a data set in memory, and episodes drawn from it in batch.

Dimensions: T tasks of `ways` classes each; N = ways * shots support rows, M = ways * query_shots
query rows; images of C channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from maml_fast.errors import DataError
from maml_fast.tasks.episodes import EVERY, Episodes, TaskStream, whole


@dataclass(frozen=True, eq=False)
class ImageSet:
    """All images of a data set as uint8, class by class.

    Raises:
        ValueError, TypeError: the fields do not belong together; names the field.
    """

    images: Tensor  # [images, C, H, W] uint8, class after class
    starts: Tensor  # int64 [classes + 1]: class c has images starts[c] .. starts[c + 1] - 1
    names: tuple[str, ...]  # of the classes, "Greek/character01"
    invert: bool  # whether dark ink is to become 1: pixel v -> (255 - v) / 255, else v / 255

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8:
            raise TypeError(f"images is {self.images.dtype}; wanted is torch.uint8")
        if self.images.dim() != 4:
            shape = list(self.images.shape)
            raise ValueError(f"images has the shape {shape}; wanted is [images, C, H, W]")
        if self.starts.dtype != torch.int64:
            raise TypeError(f"starts is {self.starts.dtype}; wanted is torch.int64")
        if not self.names or len(set(self.names)) != len(self.names):
            raise ValueError(f"names has {len(self.names)}; wanted are names, each once")
        starts = self.starts.tolist()
        if len(starts) != len(self.names) + 1:
            raise ValueError(f"starts has {len(starts)} entries for {len(self.names)} names")
        if starts[0] != 0 or starts[-1] != len(self.images):
            raise ValueError(
                f"starts goes from {starts[0]} to {starts[-1]}; wanted is 0 to {len(self.images)}"
            )
        for c, name in enumerate(self.names):
            if starts[c + 1] <= starts[c]:
                raise ValueError(f"starts gives class {name!r} no image; wanted is at least one")

    @property
    def counts(self) -> Tensor:
        """The number of images of each class, int64 [classes]."""
        return self.starts.diff()

    def subset(self, classes: Sequence[int]) -> ImageSet:
        """The given classes alone, in the given order, as a copy.

        Raises:
            ValueError: no class, a class twice, or one that is not there.
        """
        for c in classes:
            whole("classes", c, least=0, most=len(self.names) - 1)
        if not classes or len(set(classes)) != len(classes):
            raise ValueError(f"classes has {len(classes)}; wanted are classes, each once")
        starts = self.starts.tolist()
        images = torch.cat([self.images[starts[c] : starts[c + 1]] for c in classes])
        counts = self.counts[torch.tensor(classes, device=self.starts.device)]
        return ImageSet(
            images=images,
            starts=torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
            names=tuple(self.names[c] for c in classes),
            invert=self.invert,
        )

    def to(self, device: torch.device | str) -> ImageSet:
        """The same on another device."""
        return replace(self, images=self.images.to(device), starts=self.starts.to(device))


# Bytes of images taken through gathering, turning and scaling at a time: what a core's cache holds;
# on other devices so much that their memory is filled by the result, not by what leads to it.
CHUNK_CPU, CHUNK = 2**19, 2**28


class Drawn(NamedTuple):
    """Which classes and images a batch of episodes is made of."""

    classes: Tensor  # [T, ways]: class c turned by 90 * r degrees is c + r * number of classes
    support: Tensor  # [T, ways, shots], rows of ImageSet.images
    query: Tensor  # [T, ways, query_shots]


class ImageTasks(TaskStream):
    """A seeded stream of episodes, drawn by indexing on the device in batch.

    The classes of an episode are drawn without replacement, and so are the images of a class:
    each ordered choice is as likely as any other, so the labels 0 .. ways - 1 say nothing about
    a class, and support and query share no image. The same seed and calls give the same bits.

    Args:
        data: moved to `device` if it is elsewhere.
        ways: classes per episode.
        rotations: count each class four times, turned counter-clockwise by 0, 90, 180 and 270
            degrees (Santoro et al. 2016; Finn et al. 2017). The images are turned once drawn.
        seed: of a generator of this object's own, on `device`; torch's global one is not touched.
        device: where images and episodes are.
        dtype: of support_x and query_x, a floating type.

    Raises:
        ValueError, TypeError: naming the argument, what was found and what is wanted.
        DataError: fewer classes than `ways`.
    """

    def __init__(
        self,
        data: ImageSet,
        ways: int,
        *,
        rotations: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(seed, device, dtype)
        self.data = data.to(self.device)
        self.ways = whole("ways", ways, least=1)
        self.rotations = rotations
        self.classes = len(data.names) * (4 if rotations else 1)
        if self.classes < ways:
            turned = f", {self.classes} with rotations" if rotations else ""
            raise DataError(f"the data has {len(data.names)} classes{turned}; wanted are {ways}")
        height, width = data.images.shape[2:]
        if rotations and height != width:
            raise DataError(f"images are {height} x {width}; to rotate them, wanted are squares")
        counts = data.counts
        self._fewest = int(counts.min())
        self._fewest_name = data.names[int(counts.argmin())]
        self._counts = self.data.counts
        # A tensor: torch divides by a number on a GPU by multiplying with its rounded inverse.
        self._white = torch.tensor(255, dtype=dtype, device=self.device)

    def sample(self, tasks: int, shots: int, query_shots: int, own: slice = EVERY) -> Episodes:
        """`tasks` new episodes of `shots` support and `query_shots` query images a class.

        Of all that are drawn, only the pixels of the episodes in the slice `own` are fetched.

        Returns:
            support_x [T, N, C, H, W] in [0, 1] and support_y [T, N] int64, the rows class by class
            (label 0 first; the loss is a mean, so their order does not matter); query likewise.

        Raises:
            ValueError: a size is not a whole number of at least 1.
            DataError: a class has fewer images than shots + query_shots.
        """
        drawn = self.draw(tasks, shots, query_shots)
        return self.episodes(drawn if own == EVERY else Drawn(*(part[own] for part in drawn)))

    def draw(self, tasks: int, shots: int, query_shots: int) -> Drawn:
        """The first half of `sample`: only which images."""
        whole("tasks", tasks, least=1)
        wanted = whole("shots", shots, least=1) + whole("query_shots", query_shots, least=1)
        if self._fewest < wanted:
            raise DataError(
                f"class {self._fewest_name!r} has {self._fewest} images; wanted are at least "
                f"shots + query_shots = {shots} + {query_shots} = {wanted}"
            )
        among = torch.tensor(self.classes, device=self.device)
        classes = draw_distinct(among.expand(tasks), self.ways, self.generator)  # [ways, T]
        own = classes % len(self.data.names)
        images = draw_distinct(self._counts[own], wanted, self.generator)  # [wanted, ways, T]
        images += self.data.starts[own]
        images = images.permute(2, 1, 0)
        return Drawn(classes.T.contiguous(), images[..., :shots], images[..., shots:])

    def episodes(self, drawn: Drawn) -> Episodes:
        """The second half of `sample`: the pixels and labels of what was drawn."""
        quarter_turns = drawn.classes // len(self.data.names) if self.rotations else None
        return Episodes(
            self._pixels(drawn.support, quarter_turns),
            self._labels(drawn.support),
            self._pixels(drawn.query, quarter_turns),
            self._labels(drawn.query),
        )

    def _pixels(self, images: Tensor, quarter_turns: Tensor | None) -> Tensor:
        """Images [T, ways, rows] -> [T, ways * rows, C, H, W]; quarter_turns is [T, ways]."""
        tasks, ways, rows = images.shape
        shape = self.data.images.shape[1:]
        index = images.reshape(-1)
        values = torch.empty(len(index), *shape, dtype=self.dtype, device=self.device)
        turns = None
        if quarter_turns is not None:
            turns = quarter_turns[:, :, None].expand(images.shape).reshape(-1)
        on_cpu = self.device.type == "cpu"
        step = max(1, (CHUNK_CPU if on_cpu else CHUNK) // shape.numel())
        for i in range(0, len(index), step):
            pixels = self.data.images.index_select(0, index[i : i + step])
            if self.data.invert:  # only now: an inverted copy of all images would stay beside them
                pixels.bitwise_not_()  # 255 - v
            if turns is not None:
                pixels = turned(pixels, turns[i : i + step], _choose if on_cpu else torch.where)
            torch.div(pixels, self._white, out=values[i : i + step])
        return values.view(tasks, ways * rows, *shape)

    def _labels(self, images: Tensor) -> Tensor:
        """[T, ways, rows] -> int64 [T, ways * rows]."""
        tasks, ways, rows = images.shape
        labels = torch.arange(ways, device=self.device)
        return labels[:, None].expand(tasks, ways, rows).reshape(tasks, ways * rows).contiguous()


def turned(
    images: Tensor,
    quarter_turns: Tensor,
    choose: Callable[[Tensor, Tensor, Tensor], Tensor] = torch.where,
) -> Tensor:
    """Each image of [B, C, H, H] turned counter-clockwise by its number of quarters, [B], 0 to 3.

    First by two quarters, then by one: each image takes part in both, in one or in none.
    """
    turns = quarter_turns.reshape(-1, 1, 1, 1)
    images = choose(turns >= 2, images.flip(-2, -1), images)
    return choose(turns % 2 == 1, images.rot90(1, (-2, -1)), images)


def _choose(condition: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """torch.where of uint8 in half its time on CPUs, where it takes bytes one by one."""
    mask = condition.to(torch.uint8).neg_()  # 255 or 0
    return (yes.contiguous() ^ no).bitwise_and_(mask).bitwise_xor_(no)


def draw_distinct(high: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` distinct whole numbers from [0, high), all ordered choices equally likely.

    That takes `count` steps over the whole batch, whatever `high`, and no rejection. The bias of
    a remainder of 63 random bits is below high / 2^63.

    Args:
        high: int64, any shape, each at least `count`.

    Returns:
        int64 [count, *high.shape].
    """
    shape = (count, *high.shape)
    bits = torch.empty(shape, dtype=torch.int64, device=high.device).random_(generator=generator)
    i = torch.arange(count, device=high.device).reshape(-1, *[1] * high.dim())
    return decode_lehmer(bits % (high - i))


def decode_lehmer(code: Tensor) -> Tensor:
    """Lehmer codes to the ordered choices that they stand for, one to one, in place.

    The i-th number of a code, from [0, high - i), counts the i-th choice among what the choices
    before it leave: decoded from the last to the first, a number not below one before it moves up.
    """
    for first in reversed(range(len(code) - 1)):
        later = code[first + 1 :]
        later += later >= code[first]
    return code
