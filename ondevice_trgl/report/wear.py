"""What a run writes to disk, and what that takes of the flash memory's life, in a sentence."""

from ondevice_trgl.report.model import Report
from ondevice_trgl.units import format_size


def disk_line(report: Report) -> str | None:
    """Bytes written beside those predicted; None where neither is known."""
    written, predicted = report.written_bytes, report.predicted_write_bytes
    if written is None and predicted is None:
        return None
    if written is None:
        text = f"{format_size(predicted or 0)} will be written, checkpoints in mid-training aside"
    else:
        without = "without checkpoints in mid-training and resumes"
        text = f"{format_size(written)} written"
        text += "" if predicted is None else f", {format_size(predicted)} predicted {without}"
    if not report.flash_endurance_bytes:
        return text
    bytes_ = predicted if written is None else written
    share = (bytes_ or 0) / report.flash_endurance_bytes
    life = f"{report.flash_endurance_bytes / 10**12:.3g} TB"
    return f"{text}; one run is {100 * share:.2g}% of the {life} that the flash memory stands"
