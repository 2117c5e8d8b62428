"""How to train, a frozen record; see `resolved` for where its values come from.

What to train is in `workload_settings`, updates and their learning rates are in `optimizer_settings`, what is kept
between two modules in `cache_settings`, when training rests in `condition_settings`.
A caller who brings a model and a dataset of their own needs `TrainConfig` alone. Every fault is reported, not only the
first.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from ondevice_trgl import checks
from ondevice_trgl.cache_settings import CACHE_DTYPES as CACHE_DTYPES
from ondevice_trgl.cache_settings import CACHE_TIERS as CACHE_TIERS
from ondevice_trgl.cache_settings import SHUFFLES as SHUFFLES
from ondevice_trgl.cache_settings import CacheSettings
from ondevice_trgl.checks import setting
from ondevice_trgl.condition_settings import ConditionSettings
from ondevice_trgl.errors import ConfigError
from ondevice_trgl.imported import name_of
from ondevice_trgl.optimizer_settings import LR_SCHEDULES as LR_SCHEDULES
from ondevice_trgl.optimizer_settings import OPTIMIZERS as OPTIMIZERS
from ondevice_trgl.optimizer_settings import OptimizerSettings
from ondevice_trgl.policy import Stated, parse_budget
from ondevice_trgl.tasks import AUTO, CLASSES, KINDS, LOSSES, METRICS, MULTI_LABEL
from ondevice_trgl.workload_settings import IN_FILES as IN_FILES
from ondevice_trgl.workload_settings import ORIENTATIONS as ORIENTATIONS
from ondevice_trgl.workload_settings import Workload as Workload

SCHEDULES = ("sequential", "multi-lap", "parallel")
TRANSPORTS = ("branch", "displacement")
NORMALISATIONS = ("mean", "sum")
TAU_DEPTHS = ("constant", "half-first")
HEADS = ("pooled-linear", "conv", "mlp", "mlp-sr", "3lin")
PRECISIONS = ("fp32", "bf16", "auto")
ALLOCATORS = ("auto", "tcmalloc", "glibc", "system")
BASELINES = ("auto", "measure", "full", "skip")
EPOCHS_RULES = ("constant", "deeper", "paper")
STOPS = ("never", "stalled")
AUGMENTATIONS = ("crop", "flip", "colour")
VIEWS = 4
TRAINS = ("all", "last", "norm", "bias")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(OptimizerSettings, CacheSettings, ConditionSettings):
    """How to train. Sizes are text (`"600MB"`) or bytes; see `budget_bytes`."""

    budget: Stated | None = setting(None, checks.budget)
    """Bytes that this process and those it starts may take on CPU (peak RSS, floor included), or the device on a GPU.

    On CPU also a policy ("free-RAM minus 500MB", "50% of RAM"), or a function that gives either; both are asked between
    steps. In a container never more than its limit."""
    task: str = setting(AUTO, checks.one_of(AUTO, *KINDS))
    """What is learned of a sample. classes: one of several, given as its number. regression: a number, or a vector of
    them. multi-label: for each of several labels whether it is there, a vector of 0 and 1.
    auto is told from the data: whole numbers are classes, floats regression; where floats could be something else, as
    all are 0 or 1, or whole, it is asked for."""
    modules: str | int | tuple[str, ...] = setting("auto", checks.modules)
    """Local modules: `"auto"`, a number, or the names of the layers that each module ends with."""
    freeze_until: str | None = setting(None, checks.optional_text)
    """Layers up to this one, which it names, stay as they are and in eval mode: they are passed through once a lap,
    without auxiliary heads, and what they put out is cached for the modules behind. In the parallel schedule every
    batch passes through them."""
    freeze_norms: bool = setting(False, checks.switch)
    """Norms with running statistics (BatchNorm) stay in eval mode and keep them; their scales and shifts train on."""
    train: str = setting("all", checks.one_of(*TRAINS))
    """all; last: the network's own classifier alone; norm: scales and shifts of norms; bias: biases. With norm and bias
    the classifier and the auxiliary heads train too."""
    schedule: str = setting("sequential", checks.one_of(*SCHEDULES))
    """sequential: every module to its end; multi-lap: `laps` passes over all modules; parallel: every batch goes
    through all modules, each of which makes a step of its own on what the one before it put out. Then weights and
    optimizer state of all modules are in memory, activations and gradients of one at a time, and nothing is cached but
    what the last module puts out, once, for the classifier."""
    laps: int = setting(1, checks.int_from(1))
    epochs: int = setting(5, checks.int_from(1))
    """Epochs of each module in each lap."""
    classifier_epochs: int | None = setting(None, checks.int_from(1, optional=True))
    """Those of the network's own classifier, which is trained on what the modules put out, and is cheap; None is ten
    times `epochs`: one layer on features that stay as they are needs more steps than a head that learns with them."""
    epochs_rule: str = setting("constant", checks.one_of(*EPOCHS_RULES))
    """constant: `epochs` for every module; deeper: 2k / (K + 1) times as many for module k of K, `epochs` in the mean,
    one at least; paper: 50 + 10k in the sequential schedule, 10 + 2k a lap in multi-lap, and `epochs` is not asked."""
    warm_heads: int = setting(0, checks.int_from(0))
    """Epochs that come first, in the first lap: a module's auxiliary head trains alone, at the whole learning rate,
    on what the module puts out in eval mode. For modules with pretrained weights."""
    patience: int | None = setting(None, checks.int_from(1, optional=True))
    """Look at the validation set behind every epoch, stop a module whose accuracy there has not risen for so many, and
    keep the weights of its best epoch. None trains every epoch and keeps the last. Learning rates stay as planned."""
    stop_when: str = setting("never", checks.one_of(*STOPS))
    """stalled: the run ends, completed, when two modules in a row are not above the best before them on validation data
    by more than its standard error; what is deeper, the network's own classifier with it, is not trained."""
    tau: float | str = setting(10.0, checks.number(0.0, math.inf, open_below=True, words=("off", "multiplier")))
    """Step size of the transport cost (its weight is 1 / (2 tau)); "off" is vanilla greedy.

    With "multiplier" the weight is 1 / lambda, and lambda grows with the task loss: see `multiplier_start`."""
    tau_depth: str = setting("constant", checks.one_of(*TAU_DEPTHS))
    """constant: tau for every module; half-first: tau / 2 for the first half of them (of odd K the first K // 2)."""
    multiplier_start: float = setting(1.0, checks.number(0.0, math.inf, open_below=True))
    """lambda of every module when a lap begins (arXiv 2309.17357: 1)."""
    multiplier_rate: float = setting(1.0, checks.number(0.0, math.inf))
    """h of lambda <- lambda + h x task loss."""
    multiplier_every: int = setting(50, checks.int_from(1))
    """Steps between two such updates."""
    transport: str = setting("branch", checks.one_of(*TRANSPORTS))
    """branch: the residual branches (arXiv 2309.17357, Eq. 10); displacement: block output minus block input."""
    transport_norm: str = setting("mean", checks.one_of(*NORMALISATIONS))
    """mean over batch, channels and space (reference code), or sum a sample (the paper's formula)."""
    head: str = setting("mlp", checks.one_of(*HEADS))
    """Auxiliary head of every module. The network's own classifier is trained behind the last, as one more head; of a
    network in one module it is the only one."""
    loss: str | Callable[[Any, Any], Any] = setting(AUTO, checks.function(AUTO, *LOSSES.values()))
    """auto: that of the task, which are cross-entropy of classes, mse of regression, bce (binary cross-entropy with
    logits) of multi-label. Or a function (outputs, labels or targets) -> scalar, the mean over samples, itself or as
    pkg.module:callable; without its own the plan counts what the task's takes. A run remembers a function by its name.
    """
    metric: str | Callable[[Any, Any], Any] = setting(AUTO, checks.function(AUTO))
    """By which heads are compared, larger is better. auto: accuracy of classes, R2 of regression, macro F1 of
    multi-label. Or a function (predictions, labels or targets) -> number, itself or as pkg.module:callable, which is
    given a whole split: class probabilities (N, classes) and labels int64 (N,), numbers (N, T) and targets float32
    (N, T), or probabilities of labels (N, T) and 0 or 1 (N, T). Memory: the predictions of a split, which the plan
    counts, and what the function takes, which it does not."""
    label_smoothing: float = setting(0.1, checks.number(0.0, 1.0))
    """Of the cross-entropy; other losses have none."""
    class_weights: str | tuple[float, ...] | None = setting(None, checks.class_weights)
    """Of each class in the cross-entropy, in the order of the classes, scaled to a mean of 1 over the training samples;
    "balanced": as one over the number of a class's training samples. With multi-label, the weight of each label where
    it is there (the positive weight of bce); "balanced": samples without it over samples with it."""
    balance: bool = setting(False, checks.switch)
    """Each class equally often in an epoch, which keeps its length: fewer samples of large ones, small ones again."""
    augment: tuple[str | Callable[[Any], Any], ...] | None = setting(None, checks.augmentations(*AUGMENTATIONS))
    """What is done to training samples, in this order, each time by the seed, the lap, the view and the sample alone.
    crop: padded by an eighth with zeros, and cut out of that; flip: left to right, every other time; colour: contrast
    and brightness. Or a function of one sample -> a tensor of its shape and dtype, itself or as pkg.module:callable,
    which may draw from the generators of torch, Python and numpy. Accuracies are of samples as they are."""
    views: int | None = setting(None, checks.int_from(1, optional=True))
    """Of each training sample, that every boundary is cached in; None is 4 with `augment`, else 1. View 0 is the sample
    as it is, and epoch e trains on view e modulo `views`. The first module reads the data, not a cache: there every
    epoch has a view of its own. Each lap draws anew."""
    batch_size: int = setting(32, checks.int_from(1))
    micro_batch: int | str = setting("auto", checks.int_from(1, words=("auto",)))
    """Samples in memory at once; `batch_size` is reached by accumulating gradients."""
    checkpoint_every: str = setting("60s", checks.interval)
    """How often a module is saved in mid-training: 30s, 5min, 1h, 200steps. A pause, and the end of a module, save it
    in any case."""
    enforce: bool = setting(True, checks.switch)
    """Keep a limit on the process while training (RLIMIT_DATA, CUDA memory fraction), so that nothing goes over the
    budget unseen. It holds for all threads: an app whose others must not see a MemoryError turns it off."""
    device: str = setting("auto", checks.device)
    precision: str = setting("fp32", checks.one_of(*PRECISIONS))
    """Of forward passes: fp32; bf16 under autocast, where the processor computes in it; auto: bf16 where it does."""
    threads: int | None = setting(None, checks.int_from(1, optional=True, most=1024))
    """Compute threads; None leaves torch's own choice."""
    seed: int = setting(0, checks.int_from(0))

    def __post_init__(self) -> None:
        given = self.augment
        if isinstance(given, str) or callable(given):
            object.__setattr__(self, "augment", tuple(given.split(",")) if isinstance(given, str) else (given,))
        for name in ("modules", "lr_steps", "class_weights", "augment"):
            if isinstance(given := getattr(self, name), list):
                object.__setattr__(self, name, tuple(given))
        super().__post_init__()
        faults = []
        if self.laps > 1 and self.schedule != "multi-lap":
            faults.append(f"laps = {self.laps}: the {self.schedule} schedule has one; set schedule = 'multi-lap'")
        if isinstance(self.micro_batch, int) and self.batch_size % self.micro_batch:
            faults.append(f"micro_batch = {self.micro_batch}: must divide batch_size = {self.batch_size}")
        faults += self.rate_faults()
        for name in ("label_smoothing", "class_weights") if self.has_own_loss else ():
            if (value := getattr(self, name)) != DEFAULTS[name]:
                faults.append(f"{name} = {checks.plain(value)}: loss = {self.loss_name} has none, cross-entropy has")
        if self.views is not None and not self.augment:
            faults.append(f"views = {self.views}: without augment all of them would be the same; set augment")
        faults += self.task_faults(self.asked_task)
        if self.balance and self.class_weights == "balanced":
            faults.append("class_weights = 'balanced': balance draws classes equally often already; leave one out")
        if self.balance and self.shuffle != "exact":
            faults.append(f"shuffle = {self.shuffle!r}: balance draws classes in turns, from anywhere; leave one out")
        if self.tau_depth != "constant" and isinstance(self.tau, str):
            faults.append(f"tau_depth = {self.tau_depth!r}: tau = {self.tau!r} has no half; give tau a number")
        for name in ("multiplier_start", "multiplier_rate", "multiplier_every"):
            if self.tau != "multiplier" and (value := getattr(self, name)) != DEFAULTS[name]:
                faults.append(f"{name} = {value}: there is no multiplier; set tau = 'multiplier'")
        faults += self._epoch_faults()
        if faults:
            raise ConfigError(faults, source=type(self).__name__)

    def _epoch_faults(self) -> list[str]:
        faults = []
        if self.epochs_rule == "paper" and self.epochs != DEFAULTS["epochs"]:
            faults.append(f"epochs = {self.epochs}: epochs_rule = 'paper' has its own; leave one of the two out")
        if self.schedule == "parallel":
            names = ("epochs_rule", "warm_heads", "patience", "stop_when")
            together = {name: getattr(self, name) for name in names}
            faults += [
                f"{name} = {value!r}: in the parallel schedule all modules train side by side"
                for name, value in together.items()
                if value != DEFAULTS[name]
            ]
        which = "modules = 1" if self.modules == 1 else "train = 'last'"
        if self.warm_heads and (self.modules == 1 or self.train == "last"):
            faults.append(f"warm_heads = {self.warm_heads}: with {which} there are no auxiliary heads")
        if self.stop_when == "stalled" and (self.modules == 1 or self.train == "last" or self.laps > 1):
            which = f"laps = {self.laps}" if self.laps > 1 else which
            faults.append(f"stop_when = 'stalled': with {which} no module is the last that helps")
        return faults

    @property
    def budget_bytes(self) -> int | None:
        """The budget as bytes; None where none was stated, or one that has to be asked for (see `Allowance`)."""
        budget = None if self.budget is None or callable(self.budget) else parse_budget(self.budget)
        return budget if isinstance(budget, int) else None

    @property
    def view_count(self) -> int:
        """Views of each training sample."""
        usual = VIEWS if self.augment else 1  # four: one more is a quarter of the cache, and adds little
        return usual if self.views is None else self.views

    @property
    def fine_tunes(self) -> bool:
        """Whether anything of the network is kept as it is."""
        return self.freeze_until is not None or self.freeze_norms or self.train != "all"

    @property
    def own_epochs(self) -> int:
        """Epochs of the network's own classifier in each lap; with the paper's rule as many as the first module has."""
        usual = self.epochs_of(0, 1) if self.epochs_rule == "paper" else 10 * self.epochs
        return usual if self.classifier_epochs is None else self.classifier_epochs

    def epochs_of(self, index: int, modules: int) -> int:
        """Epochs in each lap of module `index` (from 0) of `modules` that train, the own classifier not counted."""
        if self.epochs_rule == "paper":
            return 50 + 10 * (index + 1) if self.schedule == "sequential" else 10 + 2 * (index + 1)
        if self.epochs_rule == "constant":
            return self.epochs
        before, behind = (self.epochs * k * (k + 1) / (modules + 1) for k in (index, index + 1))
        return max(1, round(behind) - round(before))

    def mean_epochs(self, modules: int) -> int:
        """Epochs of `modules` in the mean, in each lap."""
        modules = max(1, modules)
        return max(1, round(sum(self.epochs_of(k, modules) for k in range(modules)) / modules))

    @property
    def asked_task(self) -> str:
        """The task as it was stated, by its own name or by a loss that only one has; else auto."""
        by_loss = {loss: kind for kind, loss in LOSSES.items()}
        return by_loss.get(self.loss, AUTO) if self.task == AUTO and isinstance(self.loss, str) else self.task

    def task_faults(self, kind: str) -> list[str]:
        """What does not go with a task of that kind; auto goes with all."""
        faults = []
        if kind != AUTO and not self.has_own_loss and self.loss not in (AUTO, LOSSES[kind]):
            faults.append(f"loss = {self.loss!r}: task = {kind!r} has {LOSSES[kind]}, or a function of your own")
        refused = {AUTO: (), CLASSES: (), MULTI_LABEL: ("label_smoothing", "balance")}
        for name in refused.get(kind, ("label_smoothing", "balance", "class_weights")):
            if (value := getattr(self, name)) != DEFAULTS[name]:
                faults.append(f"{name} = {checks.plain(value)}: task = {kind!r} has no classes; leave it out")
        return faults

    @property
    def has_own_loss(self) -> bool:
        """Whether the loss is a function of the user's."""
        return callable(self.loss) or ":" in self.loss

    @property
    def loss_name(self) -> str:
        """The loss in words: pkg.module:callable of a function."""
        return name_of(self.loss)

    def metric_name(self, kind: str) -> str:
        """What is measured of a task of that kind: accuracy, r2, f1, or pkg.module:callable of a function."""
        return METRICS[kind] if self.metric == AUTO else name_of(self.metric)

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON-ready values, functions by their names."""
        augment = None if self.augment is None else list(map(name_of, self.augment))
        functions = {"loss": self.loss_name, "metric": name_of(self.metric)}
        waits = None if self.wait_while is None else name_of(self.wait_while)
        return {**super().to_dict(), **functions, "augment": augment, "wait_while": waits}

    @property
    def has_transport(self) -> bool:
        """Whether there is a transport cost, of whatever weight."""
        return self.tau != "off"

    @property
    def tau_value(self) -> float | None:
        """tau, or None for vanilla greedy and where a multiplier takes its place."""
        return None if isinstance(self.tau, str) else float(self.tau)

    def tau_of(self, index: int, modules: int) -> float | None:
        """tau of module `index` of `modules`, the network's own classifier not counted; None as in `tau_value`."""
        halved = self.tau_depth == "half-first" and index < modules // 2
        return None if self.tau_value is None else self.tau_value / 2 if halved else self.tau_value


DEFAULTS = {f.name: f.default for record in (Workload, TrainConfig) for f in fields(record)}
"""Every setting, with what holds where nobody says otherwise."""
