"""The configuration of an evaluation, for the command and for Python."""

from __future__ import annotations

from dataclasses import dataclass

import tyro

from bclip_fast.data import filters
from bclip_fast.data.image_files import ImageConversion
from bclip_fast.data.sources import Sources, as_sources
from bclip_fast.errors import UserError

from . import few_shot, probe, suites, tasks
from .embed import CacheDtype, OnBadImage, Precision
from .faiss_index import Index
from .retrieval import Duplicates


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Data, tasks and settings of an evaluation."""

    data: Sources = ""
    """Shards (a folder with dataset.json, or a list of them as for data.shards), a folder with one folder of images per
    class, or a .csv file. A folder may also have such a folder or file for each split. Empty: the shards that the run
    was trained on."""
    split: str = "val"
    """Split of the data, in any usual spelling. The package's tasks set their own split."""
    filter: str = ""
    """Only for shards: evaluate the samples that this expression selects, such as "kind == 'ct'" (docs/data.md). Empty:
    all samples, whatever selection the run or the shards have."""
    task: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A protocol (retrieval, image_retrieval, zero_shot, few_shot, probe, ood, vqa, classification), a task of the
    package (pcam, vqa_rad, ...), or a task's TOML file. Repeat the flag for several tasks. Default: retrieval and
    zero_shot, if the data allow them."""
    suite: str = ""
    """All tasks of a benchmark that `data` holds: medpmc (26 rows, its protocol), or a suite's TOML file. The missing
    rows are named. It takes the place of `task`."""
    label: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Label kind for zero_shot: a metadata field of shards, a CSV column, or `class`. Repeat the flag for several."""
    by: str = ""
    """Columns whose subgroups get separate metrics, with intervals and gaps, such as sex,age. Numbers become bins."""
    prompts: str = "auto"
    """Prompt set: the name of a task (pcam, lc25000_lung, ...), a TOML file, or an .npz or .safetensors file of learned
    prompts (docs/evaluation.md). auto: the task's prompts, or the label values themselves."""
    templates: tuple[str, ...] = ()
    """Prompt templates in place of those of the prompt set, each with {} for the class name. A class is the normalised
    mean of all of them."""
    duplicates: Duplicates = "strict"
    """Correct answers in retrieval. `strict` accepts only the query's own pair, as in the paper. `captions` also
    accepts pairs with the same text, `images` pairs with the same image, and `any` both."""
    index: Index = "exact"
    """Search method of retrieval. `exact` ranks all candidates. The other methods use faiss, and hnsw and ivf are
    approximate."""
    gallery: str = ""
    """Candidates of image_retrieval: another split of the data, such as train, or the path of other data. Empty: the
    other images of the same split."""
    ood: str = ""
    """Path of other data, for the protocol ood: how well its images are told from those of the data."""
    share: tuple[float, ...] = (0.01, 0.1, 1.0)
    """Fractions of the training data that probes are trained on."""
    shots: tuple[int, ...] = ()
    """Numbers of samples per class that further probes are trained on, and those of few_shot. few_shot takes 1, 2, 4, 8
    and 16 if none is set."""
    classifier: tuple[few_shot.Classifier, ...] = ("centroid", "logistic", "tip_adapter")
    """Classifiers of few_shot: nearest class centroid, logistic regression, and the training-free Tip-Adapter."""
    num_seeds: int = 3
    """Random subsets per probe setting. The report gives their mean and standard deviation."""
    protocol: probe.Protocol = "held_out"
    """Selection of a probe's epoch. `held_out` selects it on validation data. `elevater` reports the best epoch on the
    test set, as the paper's toolkit does. Use it only for comparison."""
    seed: int = 0
    """Seed of the validation subset of train, for data without a val split of its own."""
    cache: str = "auto"
    """Folder of cached embeddings. auto: BCLIP_CACHE, or ~/.cache/bclip_fast/embeddings. none: no cache. A few of them
    are computed again and compared before they are used."""
    keep: CacheDtype = "fp32"
    """Number format of cached embeddings."""
    device: str = "auto"
    """Device of the model. auto: a CUDA GPU if there is one, else the CPU."""
    precision: Precision = "fp32"
    """Number format of the towers. Embeddings are compared in float32. auto: bf16 if the device multiplies it in
    hardware, else fp32."""
    batch_size: int = 64
    """Images or texts per batch of the towers."""
    num_workers: int = 2
    """Threads that decode and resize images."""
    image_conversion: ImageConversion = "standard"
    """How image files become pixels. standard: the rules of docs/images.md. open_clip: as open_clip does, to repeat its
    published results."""
    on_bad_image: OnBadImage = "stop"
    """What follows when an image cannot be decoded. stop: an error that names it. skip: the sample counts in no score,
    and the log and results.json name it."""
    num_gallery_queries: int = 6
    """Example queries in the report, per direction of retrieval."""
    progress: bool = True
    """Show progress bars."""

    def __post_init__(self) -> None:
        """Check the fields and read every task. Raises UserError."""
        object.__setattr__(self, "data", as_sources(self.data, "data"))
        if self.filter not in ("", filters.ALL):
            filters.parse(self.filter)
        for task in self.task:
            tasks.load(task)
        if self.suite:
            suites.load(self.suite)
            if self.task:
                raise UserError(
                    f"suite={self.suite!r} names the tasks, so --task cannot add any; leave one of them out"
                )
        if not all(0 < fraction <= 1 for fraction in self.share) or not all(num >= 1 for num in self.shots):
            raise UserError(f"share={self.share} must lie in (0, 1], and shots={self.shots} must be at least 1")
        if self.num_seeds < 1 or not (self.share or self.shots):
            raise UserError(
                f"a probe needs num_seeds={self.num_seeds} to be at least 1, and at least one value of share or shots"
            )
        if not self.classifier:
            raise UserError(f"classifier is empty; name at least one of {', '.join(few_shot.CLASSIFIERS)}")
        if self.num_gallery_queries < 1:
            raise UserError(f"num_gallery_queries={self.num_gallery_queries} must be at least 1")
