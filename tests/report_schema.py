"""`report.json` as its readers know it, and a check against it."""

from typing import Any

WHOLE, SHARE, SECONDS, TEXT = "whole", "share", "seconds", "text"
SCHEMA: dict[str, Any] = {
    "schema_version": WHOLE, "status": TEXT, "run_dir": TEXT,
    "budget_bytes": WHOLE, "budget_kind": TEXT, "meter": TEXT, "floor_bytes": WHOLE,
    "predicted_peak_bytes": WHOLE, "measured_peak_bytes": WHOLE,
    "predicted_write_bytes": WHOLE, "written_bytes": WHOLE,
    "plan": {
        "num_modules": WHOLE, "schedule": TEXT, "laps": WHOLE, "batch_size": WHOLE, "micro_batch_size": WHOLE,
        "grad_accum_steps": WHOLE, "activation_checkpointing": bool, "optimizer": TEXT,
        "cache": {"tier": TEXT, "dtype": TEXT, "bytes": WHOLE, "dir": TEXT}, "reasons": [TEXT],
    },
    "modules": [{
        "index": WHOLE, "name": TEXT, "params": WHOLE, "predicted_peak_bytes": WHOLE, "measured_peak_bytes": WHOLE,
        "train_seconds": SECONDS, "cache_read_bytes": WHOLE, "cache_write_bytes": WHOLE, "train_loss": float,
        "transport_cost": float, "train_accuracy": SHARE, "val_accuracy": SHARE,
    }],
    "baselines": {
        name: {
            "status": TEXT, "measured_peak_bytes": None, "seconds_per_epoch": None, "batch_size": WHOLE,
            "micro_batch_size": WHOLE,
        }
        for name in ("e2e", "e2e_checkpoint")
    },
    "savings": {"vs_e2e": None, "vs_e2e_checkpoint": None},
    "accuracy": {
        "best_head": WHOLE, "best_head_val": SHARE, "last_head_val": SHARE, "ensemble_val": SHARE, "test": SHARE,
        "drop": SHARE,
    },
    "seconds": {"total": SECONDS, "training": SECONDS, "cache": SECONDS, "baseline": SECONDS},
    "environment": {"torch": TEXT, "device": TEXT, "threads": WHOLE, "allocator": TEXT, "platform": TEXT},
}  # fmt: skip
"""interface.md; the keys may be more, never fewer."""


def conforms(value: Any, schema: Any, path: str = "report") -> list[str]:
    """What of `value` is not as `schema` says."""
    if isinstance(schema, dict):
        missing = [f"{path} lacks {key}" for key in schema if key not in value]
        return missing + [
            fault for key in schema if key in value for fault in conforms(value[key], schema[key], f"{path}.{key}")
        ]
    if isinstance(schema, list):
        if not isinstance(value, list) or not value:
            return [f"{path} is no list of things"]
        return [fault for i, item in enumerate(value) for fault in conforms(item, schema[0], f"{path}[{i}]")]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    good = {
        WHOLE: type(value) is int and value >= 0,
        SHARE: number and 0 <= value <= 1,
        SECONDS: number and value >= 0,
        TEXT: isinstance(value, str) and value != "",
        float: number,
        bool: isinstance(value, bool),
        None: value is None,
    }[schema]
    return [] if good else [f"{path} = {value!r}, expected {schema}"]
