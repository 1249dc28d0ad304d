"""A real mount, in the mount namespace of the kernel's machine."""

import os
import subprocess
from pathlib import Path

from google.colab._message import MessageError


def mount(mountpoint, force_remount=False, timeout_ms=120000, readonly=False):
    account, place = Path(os.environ["COLAB_ACCOUNT"]), Path(mountpoint)
    if (place / "MyDrive").is_dir() and not force_remount:
        print(
            f"Drive already mounted at {mountpoint}; to attempt to forcibly remount, call "
            f'drive.mount("{mountpoint}", force_remount=True).'
        )
        return
    if (account / "refuse").exists():
        raise MessageError("Error: credential propagation was unsuccessful")
    if place.is_mount():
        subprocess.run(["umount", "-l", place], check=True)
    if place.is_dir() and any(place.iterdir()):
        raise ValueError("Mountpoint must not already contain files")
    place.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "--bind", account, place], check=True)
    print(f"Mounted at {mountpoint}")


def flush_and_unmount(timeout_ms=24 * 60 * 60 * 1000):
    place = Path("/content/drive")
    if not place.is_mount():
        print("Drive not mounted, so nothing to flush and unmount.")
        return
    subprocess.run(["umount", place], check=True)
