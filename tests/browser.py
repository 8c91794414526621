"""A page as a browser has it."""

import pathlib
import shutil
import subprocess

import pytest


def browsed(path: pathlib.Path, width: int = 1200) -> str:
    """The document after its scripts ran; skips without a browser, fails on anything in the browser's console."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium")
    quiet = ("disable-background-networking", "disable-component-update", "disable-sync", "disable-quic")
    flags = ("headless", "no-sandbox", "disable-gpu", "no-first-run", *quiet, f"window-size={width},2400")
    flags = (*flags, "virtual-time-budget=10000", "enable-logging=stderr", "dump-dom")
    profile = f"--user-data-dir={path.with_name('profile')}"
    command = [chromium, *(f"--{flag}" for flag in flags), profile, path.as_uri()]
    seen = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in seen.stderr, seen.stderr[-2000:]
    return seen.stdout
