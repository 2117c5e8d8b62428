"""Every option, declared once; a command names those that it takes.

An option that is a setting bears the name of its field in `config.py` and defaults to None, "not given": what holds
then, the config file, the profile or the field's default says.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from ondevice_trgl import config, tasks
from ondevice_trgl.cli.shell import PROGRAM, Shell
from ondevice_trgl.config import DEFAULTS
from ondevice_trgl.errors import UnknownNameError
from ondevice_trgl.job import ACCUMULATE

_DECLARED: dict[str, inspect.Parameter] = {}


def _completer(choices: Sequence[str]) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        return [name for name in choices if name.startswith(incomplete)]

    return complete


def _checker(spelling: str, choices: Sequence[str]) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if value is not None and value not in choices:
            raise UnknownNameError(f"value for {spelling}", value, choices)
        return value

    return check


def _declare(
    panel: str, name: str, kind: Any, spelling: str, text: str, *, choices: Sequence[str] = (), default: Any = None
) -> None:
    """`spelling` is flags and, last, the word for the value: "-b --budget SIZE"."""
    flags = [part for part in spelling.split() if part.startswith("-")]
    words = [part for part in spelling.split() if not part.startswith("-")]
    shown = DEFAULTS.get(name, default)
    info = typer.Option(
        *flags,
        help=text if shown is None or shown is False else f"{text} (default: {shown})",
        rich_help_panel=panel,
        metavar="|".join(choices) or "".join(words),
        show_default=False,
        autocompletion=_completer(choices) if choices else None,
        # a bad setting is left to config.resolve, which reports it together with every other fault
        callback=_checker(flags[-1], choices) if choices and name not in DEFAULTS else None,
    )
    _add(name, kind if default is not None else kind | None, info, default)


def _add(name: str, kind: Any, info: Any, default: Any = inspect.Parameter.empty) -> None:
    _DECLARED[name] = inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info]
    )


_P = "Memory"
_declare(
    _P,
    "budget",
    str,
    "-b --budget SIZE",
    "Most memory to use, like 600MB, 2GiB or 'free-RAM minus 500MB': the process, or the GPU's.",
)
_declare(
    _P, "budgets", list[str], "-b --budget SIZE,...", "Budgets of TRGL, a row each; between commas, or given again."
)
_declare(_P, "profile", str, "-p --profile NAME|FILE", "Device profile to take settings from; see `profiles ls`.")
_declare(_P, "modules", str, "--modules auto|K|NAME,...", "Local modules: how many, or the layers they end with.")
_declare(_P, "micro_batch", str, "--micro-batch auto|N", "Samples in memory at once; gradients are accumulated.")
_declare(_P, "cache", str, "--cache", "Where activations wait between modules.", choices=config.CACHE_TIERS)
_declare(_P, "cache_dir", str, "--cache-dir PATH", "Folder of the disk cache. (default: in the run directory)")
_declare(_P, "cache_limit", str, "--cache-limit SIZE", "Most disk space for the cache.")
_declare(_P, "cache_dtype", str, "--cache-dtype", "Number format of the cache.", choices=config.CACHE_DTYPES)
_declare(_P, "shuffle", str, "--shuffle", "Draw from the whole cache, or from chunks of it.", choices=config.SHUFFLES)

_P = "What to train"
_declare(_P, "model", str, "--model NAME", "Model of the zoo, or your own as pkg.module:callable.")
_declare(
    _P,
    "data",
    str,
    "--data NAME",
    "Dataset, folder:PATH, csv:FILE, synthetic:CxHxW:CLASSES:N (for CLASSES regT or multiT: T targets), or your own"
    " pkg.module:callable.",
)
_declare(
    _P, "task", str, "--task", "What is learned; auto: whole numbers are classes, floats regression.",
    choices=(tasks.AUTO, *tasks.KINDS),
)  # fmt: skip
_declare(_P, "image_size", int, "--image-size N", "Resize images to N x N. (default: as they are)")
_declare(
    _P, "orientation", str, "--orientation", "Picture files upright as their EXIF says, or as stored.",
    choices=config.ORIENTATIONS,
)  # fmt: skip
_declare(_P, "data_root", str, "--data-root PATH", "Where to look for dataset files first.")
_declare(_P, "train_limit", int, "--train-limit N", "Use at most N training samples.")
_declare(
    _P, "init_gain", float, "--init-gain X", "Orthogonal weights, times this. (default: the model's own initialisation)"
)
_declare(_P, "weights", str, "--weights FILE", "Start from a state dict: safetensors, or of torch.save.")
_declare(_P, "weights_skip", str, "--weights-skip NAME,...", "Tensors or layers that it does not fill.")

_P = "Fine-tuning"
_declare(_P, "freeze_until", str, "--freeze-until NAME", "Layers up to this one stay as they are, passed through once.")
_declare(_P, "freeze_norms", bool, "--freeze-norms", "BatchNorms keep their statistics; scales and shifts train on.")
_declare(
    _P, "train", str, "--train", "What trains, auxiliary heads aside; last: the classifier.", choices=config.TRAINS
)
_declare(_P, "warm_heads", int, "--warm-heads N", "Epochs in which auxiliary heads train alone, before the modules.")

_P = "Method"
_declare(
    _P,
    "classifier_epochs",
    int,
    "--classifier-epochs N",
    "Epochs of the network's own classifier. (default: ten times)",
)
_declare(_P, "epochs", int, "--epochs N", "Epochs of each module in each lap.")
_declare(
    _P, "epochs_rule", str, "--epochs-rule", "Epochs by depth: all alike, deeper modules more, or as published.",
    choices=config.EPOCHS_RULES,
)  # fmt: skip
_declare(_P, "patience", int, "--patience N", "Stop a module that has not gained on validation for N epochs.")
_declare(
    _P,
    "stop_when",
    str,
    "--stop-when",
    "stalled: end the run when deeper modules no longer help.",
    choices=config.STOPS,
)
_declare(_P, "batch_size", int, "--batch-size N", "Samples an optimizer step.")
_declare(_P, "lr", float, "--lr X", "Learning rate. (default: 0.05 for sgd, 0.001 for adamw)")
_declare(_P, "lr_schedule", str, "--lr-schedule", "Learning rate over a module's epochs.", choices=config.LR_SCHEDULES)
_declare(_P, "lr_steps", str, "--lr-steps X,...", "Where step falls, in shares of the steps. (default: 0.5,0.75)")
_declare(_P, "lr_gamma", float, "--lr-gamma X", "Factor of the rate at each of those. (default: 0.1)")
_declare(_P, "warmup", float, "--warmup X", "Share of a module's steps over which the rate rises.")
_declare(_P, "clip_norm", float, "--clip-norm X", "Scale gradients of a module's step down to this norm.")
_declare(_P, "optimizer", str, "--optimizer", "Optimizer.", choices=config.OPTIMIZERS)
_declare(
    _P, "schedule", str, "--schedule", "Each module to its end, in laps, or all in step.", choices=config.SCHEDULES
)
_declare(_P, "laps", int, "--laps N", "Passes over all modules, with multi-lap.")
_declare(
    _P,
    "tau",
    str,
    "--tau X|off|multiplier",
    "Step size of the transport cost; smaller holds features closer. multiplier: its weight falls with the loss.",
)
_declare(_P, "tau_depth", str, "--tau-depth", "half-first: half of it in the first half.", choices=config.TAU_DEPTHS)
_declare(_P, "multiplier_start", float, "--multiplier-start X", "Multiplier of every module at the start.")
_declare(_P, "multiplier_rate", float, "--multiplier-rate X", "How far it moves, times the task loss.")
_declare(_P, "multiplier_every", int, "--multiplier-every N", "Steps between two such moves.")
_declare(_P, "transport", str, "--transport", "What the transport cost measures.", choices=config.TRANSPORTS)
_declare(_P, "head", str, "--head", "Auxiliary head of each module.", choices=config.HEADS)
_declare(
    _P,
    "loss",
    str,
    "--loss NAME",
    "The task's (cross-entropy, mse, bce), or your own of (outputs, labels) as pkg.module:callable.",
)
_declare(
    _P,
    "metric",
    str,
    "--metric NAME",
    "The task's (accuracy, R2, macro F1), or your own of (predictions, labels), larger is better.",
)
_declare(
    _P,
    "class_weights",
    str,
    "--class-weights balanced|X,...",
    "Weight of each class in the loss, in their order; multi-label: of a label where it is there.",
)
_declare(_P, "balance", bool, "--balance", "Draw all classes equally often, where some have fewer samples.")
_declare(
    _P, "augment", str, "--augment NAME,...",
    "Of training samples: crop, flip, colour, or your own of one sample as pkg.module:callable.",
)  # fmt: skip
_declare(
    _P, "views", int, "--views N",
    "Views of each training sample that are cached; epochs take turns. (default: 4 with --augment)",
)  # fmt: skip
_declare(_P, "seed", int, "--seed N", "Seed of weights and order.")

_P = "Run and output"
_declare(_P, "config", str, "-c --config FILE", "TOML file of settings; flags win over it.")
_declare(_P, "device", str, "--device auto|cpu|cuda[:N]", "Where to compute.")
_declare(
    _P, "precision", str, "--precision", "Of forward passes; auto: bf16 where it is fast.", choices=config.PRECISIONS,
)  # fmt: skip
_declare(_P, "nice", float, "--nice PERCENT", "Compute at most this share of the time.")
_declare(_P, "max_celsius", float, "--max-celsius N", "Wait while the device is hotter.")
_declare(_P, "max_load", float, "--max-load PERCENT", "Wait while others take more of the cores.")
_declare(_P, "wait_while", str, "--wait-while PKG.MODULE:CALLABLE", "Wait while it says so.")
_declare(_P, "min_battery", float, "--min-battery PERCENT", "Wait while the battery has less.")
_declare(_P, "threads", int, "--threads N", "Compute threads. (default: torch's choice)")
_declare(
    _P,
    "allocator",
    str,
    "--allocator",
    "Memory allocator: tcmalloc where it is installed, else glibc tuned to be small.",
    choices=config.ALLOCATORS,
    default="auto",
)
_declare(_P, "checkpoint_every", str, "--checkpoint-every T", "Save in mid-training: 30s, 5min, 200steps.")
_declare(_P, "run_dir", str, "-o --run-dir PATH", "Where the run goes. (default: a new folder in runs/)")
_declare(_P, "force", bool, "--force", "Write over what is there.", default=False)
_declare(
    _P,
    "baseline",
    str,
    "--baseline",
    "Measure end-to-end training beside it.",
    choices=config.BASELINES,
    default="auto",
)
_declare(
    _P, "progress", str, "--progress", "Live display, plain lines, or none.",
    choices=("auto", "plain", "none"), default="auto",
)  # fmt: skip
_declare(
    _P, "accumulate", str, "--accumulate N", "Micro-batches a step of the end-to-end row that accumulates.",
    default=str(ACCUMULATE),
)  # fmt: skip
_declare(_P, "repeat", str, "--repeat N", "Measure every row N times, in turn; medians are shown.", default="1")
_declare(_P, "dry_run", bool, "--dry-run", "Plan and stop, as `plan` does.", default=False)
_declare(_P, "json", bool, "--json", "Print one JSON object on stdout and nothing else.", default=False)
_declare(_P, "quiet", bool, "-q --quiet", "Nothing on stderr but errors.", default=False)
_declare(_P, "verbose", bool, "-v --verbose", "Where each setting came from; tracebacks.", default=False)
_declare(_P, "no_color", bool, "--no-color", "No colours; NO_COLOR does the same.", default=False)

_P = "Options"
_declare(
    _P, "use_head", str, "--head best|last|K", "Head to use: best by validation, last, or of module K.", default="best"
)
_declare(
    _P, "judged_head", str, "--head best|last|K|ensemble", "Head to judge by; ensemble: the mean of all.",
    default="best",
)  # fmt: skip
_declare(_P, "html", str, "--html FILE", "Write a self-contained page instead.")
_declare(_P, "format", str, "--format", "How to print it.", choices=("text", "markdown"), default="text")
_declare(_P, "export_format", str, "--format", "What to write.", choices=("state-dict",), default="state-dict")
_declare(_P, "output", str, "-o --output FILE", "File to write. (default: RUN's name, in this folder)")
_declare(_P, "other_data", str, "--data NAME", "Another dataset than the run's own.")
_declare(
    _P, "classes_from_order", bool, "--classes-from-order",
    "Match classes of other data by their order, not by name.", default=False,
)  # fmt: skip
_declare(_P, "top", str, "--top N", "Classes to show for each picture.", default="1")
_declare(
    _P, "pareto", bool, "--pareto", "List the choices that no other beats in memory, time and disk.", default=False
)
_declare(_P, "cache_alone", bool, "--cache", "The boundary cache and leftovers alone, which is usual.", default=False)
_declare(_P, "everything", bool, "--all", "The whole run: weights, plan and report too.", default=False)
_declare(_P, "yes", bool, "--yes", "Do not ask before --all.", default=False)
_add("run", str, typer.Argument(metavar="RUN", help="Run directory.", show_default=False))
_add(
    "paths",
    list[str],
    typer.Argument(metavar="FILE|FOLDER...", help="Pictures, or folders of them.", show_default=False),
)
_add("name", str, typer.Argument(metavar="NAME", help="Profile name or file.", show_default=False))
_add(
    "folders",
    list[str] | None,
    typer.Argument(metavar="[FOLDER...]", help="Folders to look in. (default: runs/)", show_default=False),
    None,
)
_add(
    "runs",
    list[str],
    typer.Argument(metavar="RUN|FOLDER...", help="Run directories, or folders of some.", show_default=False),
)

OUTPUT = ("json", "verbose", "no_color")
RUNNING = ("allocator", "progress", "quiet")
TRAINING = (
    *(name for name in _DECLARED if name in DEFAULTS or name in ("profile", "config", "run_dir", "force", "baseline")),
    *RUNNING,
    *OUTPUT,
)  # fmt: skip
COMPARING = (*(name for name in TRAINING if name not in ("budget", "baseline")), "budgets", "accumulate", "repeat")
Command = Callable[[Shell, dict[str, Any]], int]


def takes(*names: str, example: str) -> Callable[[Command], Callable[..., int]]:
    """A typer command with the named options, that hands them to `command` in one dict, less those of the Shell."""

    def decorate(command: Command) -> Callable[..., int]:
        def typed(ctx: typer.Context, **given: Any) -> int:
            shell: Shell = ctx.obj
            shell.json = given.pop("json", False)
            shell.quiet = given.pop("quiet", False)
            shell.verbose = given.pop("verbose", False) or shell.verbose
            shell.no_color = given.pop("no_color", False)
            return command(shell, given)

        context = inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
        order = [name for name in _DECLARED if name in names]
        typed.__signature__ = inspect.Signature([context, *(_DECLARED[name] for name in order)])  # type: ignore[attr-defined]
        typed.__annotations__ = {}
        typed.__name__ = command.__name__
        typed.__doc__ = f"{(command.__doc__ or '').strip()}\n\nExample: {PROGRAM} {example}"
        return typed

    return decorate
