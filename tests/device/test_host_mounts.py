"""A folder that is RAM is told from one on a disk."""

from pathlib import Path

import pytest

from ondevice_trgl.device.host import is_in_ram

MOUNTS = """\
/dev/sda1 / ext4 rw,relatime 0 0
tmpfs /run tmpfs rw,nosuid 0 0
/dev/sdb1 /run/media/card vfat rw 0 0
tmpfs /a\\040b tmpfs rw 0 0
ramfs /ram ramfs rw 0 0
tmpfs /home tmpfs rw 0 0
/dev/sdc1 /home ext4 rw 0 0
cut short
"""


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("/", False),
        ("/data/run", False),
        ("/run", True),
        ("/run/user/1", True),
        ("/runs/1", False),
        ("/run/media/card/x", False),
        ("/a b/c", True),
        ("/ram/x", True),
        ("/home/me", False),  # a disk lies on top
    ],
)
def test_the_file_system_of_the_nearest_mount_counts(tmp_path: Path, folder: str, expected: bool) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(MOUNTS)
    assert is_in_ram(Path(folder), mounts) is expected


def test_where_the_system_does_not_tell_it_is_taken_for_a_disk(tmp_path: Path) -> None:
    assert not is_in_ram(tmp_path, tmp_path / "none")
