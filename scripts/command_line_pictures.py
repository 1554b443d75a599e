"""Take the pictures of the command line in ``docs/images``: its real output, on an embedded server.

Run it with ``python -m scripts.command_line_pictures``; it needs Chromium. Each command runs on a terminal of
its own, so it has the colors and the width that a person sees.
"""

from __future__ import annotations

import html
import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from dstack_core import Client, Task
from dstack_core.local import LocalServer

IMAGES = Path(__file__).parent.parent / "docs" / "images"
COLUMNS = 112
# Pixels of one cell of the font, and around the text.
_WIDTH, _HEIGHT, _MARGIN = 8.43, 20, 16
_COLORS = {
    "1": "font-weight:700",
    "2": "color:#8b949e",
    "31": "color:#ff7b72",
    "32": "color:#7ee787",
    "33": "color:#e3b341",
}
_PAGE = """<!doctype html><meta charset="utf-8"><style>
body {{ margin: 0; background: #0d1117; color: #e6edf3; }}
pre {{ margin: {margin}px; font: 14px/{height}px "DejaVu Sans Mono", monospace; }}
.prompt {{ color: #79c0ff; }}
</style><pre>{text}</pre>"""


def output_of(*arguments: str) -> str:
    """Return what a command writes to a terminal, with its colors."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(COLUMNS=str(COLUMNS), TERM="xterm-256color")
        os.environ.pop("NO_COLOR", None)
        os.execv(sys.executable, [sys.executable, "-m", "dstack_core", *arguments])  # noqa: S606 - this program
    written = b""
    try:
        while part := os.read(terminal, 65536):
            written += part
    except OSError:
        # The other end is closed: the command has ended.
        pass
    os.close(terminal)
    os.waitpid(pid, 0)
    return written.decode().replace("\r\n", "\n")


def page(shown: list[tuple[str, str]]) -> tuple[str, int]:
    """Return commands and their outputs as HTML, and its number of lines."""
    blocks = []
    for command, output in shown:
        text = html.escape(output.rstrip("\n"), quote=False)
        text = re.sub(r"\x1b\[0m", "</span>", text)
        text = re.sub(r"\x1b\[(\d+)m", lambda found: f'<span style="{_COLORS[found[1]]}">', text)
        blocks.append(f'<span class="prompt">$</span> {html.escape(command)}\n{text}')
    whole = "\n\n".join(blocks)
    return _PAGE.format(text=whole, margin=_MARGIN, height=_HEIGHT), whole.count("\n") + 1


def take(name: str, *commands: str) -> None:
    """Run commands, and write the picture of them."""
    shown = [(f"dstack-core {command}", output_of(*command.split())) for command in commands]
    content, lines = page(shown)
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        sys.exit("Chromium: expected it on the PATH, found none. Install it, or set CHROMIUM.")
    width, height = round(COLUMNS * _WIDTH) + 2 * _MARGIN, lines * _HEIGHT + 2 * _MARGIN
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "page.html"
        file.write_text(content)
        target = IMAGES / f"command-line-{name}.png"
        subprocess.run(
            [
                chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                f"--user-data-dir={folder}/profile", f"--window-size={width},{height}",
                f"--screenshot={target}", file.as_uri(),
            ],
            check=True,
            capture_output=True,
            timeout=120,
        )  # fmt: skip
    print(f"{target}: {width} x {height}")


def submit_examples(client: Client) -> None:
    """Submit what the lists show: runs of Airflow, Prefect and a user in several states."""
    done = [
        ("nightly-train-3b0f92", "airflow:nightly/manual__2026-11-27/train/1of1#abc/1", "sleep 2", "nlp"),
        (
            "nightly-evaluate-77c1e0",
            "airflow:nightly/manual__2026-11-27/evaluate/1of1#abd/1",
            "exit 1",
            "nlp",
        ),
        ("sweep-fit-91d2aa", "prefect:flow_run/0b1c/stop/ab-0/1", "sleep 1", "vision"),
    ]
    ended = [
        client.runs.submit(Task(commands=[command]), name, marker=marker, tags={"team": team})
        for name, marker, command, team in done
    ]
    for run in ended:
        run.wait(60, poll_interval=0.1)
    active = client.runs.submit(
        Task(commands=["sleep 300"]),
        "sweep-fit-5f00c3",
        marker="prefect:flow_run/0b1d/stop/ab-0/1",
        tags={"team": "vision"},
    )
    events = active.follow(poll_interval=0.1)
    while active.last_status != "running":
        next(events)


def main() -> None:
    """Take both pictures."""
    with (
        tempfile.TemporaryDirectory() as home,
        LocalServer(step_seconds=0.05) as server,
        server.client() as client,
    ):
        os.environ.update(
            HOME=home, DSTACK_SERVER_URL=server.url, DSTACK_PROJECT=server.project, DSTACK_TOKEN=server.token
        )
        submit_examples(client)
        take("lists", "ps --all", "cost --by tag:team", "offers --gpu A100 -n 4")
        take("doctor", "doctor", "doctor --project nope")
        for run in client.runs.list():
            if run.last_status.is_active:
                run.stop(abort=True, until="ended", timeout=30)


if __name__ == "__main__":
    main()
