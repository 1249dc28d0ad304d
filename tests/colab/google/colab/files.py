import os
import shutil
from pathlib import Path


def download(filename):
    if not Path(filename).exists():
        raise FileNotFoundError(f"Cannot find file: {filename}")
    shutil.copy(filename, Path(os.environ["COLAB_ACCOUNT"]) / "browser")
