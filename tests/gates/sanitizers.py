"""What every run under a sanitizer needs."""

import os
import shutil
import subprocess


def compiler() -> list[str]:
    return os.environ.get("CXX", "g++").split()


def can_fix_addresses() -> bool:
    """ThreadSanitizer knows fewer random places for a process than newer kernels choose."""
    command = shutil.which("setarch")
    return command is not None and subprocess.run([command, "-R", "true"]).returncode == 0
