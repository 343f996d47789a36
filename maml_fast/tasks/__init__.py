"""Few-shot tasks, sampled in batches on the device that trains on them."""

from maml_fast.errors import DataError
from maml_fast.tasks.download import DownloadError, download_omniglot
from maml_fast.tasks.episodes import Episodes
from maml_fast.tasks.folders import load_folder
from maml_fast.tasks.images import Drawn, ImageSet, ImageTasks
from maml_fast.tasks.omniglot import load_omniglot
from maml_fast.tasks.sinusoid import SinusoidTasks, Waves
from maml_fast.tasks.splits import classes_named, group_of, split_classes

__all__ = [
    "DataError",
    "DownloadError",
    "Drawn",
    "Episodes",
    "ImageSet",
    "ImageTasks",
    "SinusoidTasks",
    "Waves",
    "classes_named",
    "download_omniglot",
    "group_of",
    "load_folder",
    "load_omniglot",
    "split_classes",
]
