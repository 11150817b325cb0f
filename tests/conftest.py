import subprocess
import sys

import pytest


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """Folder with packs of real digits, 8x8 pixels: low-train.h5 and low-test.h5 (0 to 4), high-… (5 to 9)."""
    folder = tmp_path_factory.mktemp("digits")
    for name, classes in (("low", "0,1,2,3,4"), ("high", "5,6,7,8,9")):
        for part in ("train", "test"):
            command = ["-m", "loaders.pack", "sklearn:digits", folder / f"{name}-{part}.h5", "--workers", "1"]
            options = ["--classes", classes, "--part", part, "--holdout", "0.3"]
            subprocess.run([sys.executable, *command, *options], check=True)
    return folder
