"""Start an inference service, ask it from tasks, and stop it whatever happens to them.

The server comes from the environment or ``~/.dstack/config.yml``. The service stands in for an inference
server: it gives back what it is asked.
"""

from __future__ import annotations

import os

import httpx
from prefect import flow, task, unmapped

from dstack_core import GPU, Resources, Service
from prefect_dstack import stop_dstack_runs, stop_run, submit_run, wait_for_service

SERVER = """
python3 -u - <<'END'
import http.server

class Echo(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"echo: " + body)

http.server.HTTPServer(("", {port}), Echo).serve_forever()
END
""".strip()

# Stops the service also when the flow is cancelled or its process dies.
stop_runs = stop_dstack_runs()


@task
def ask(url: str, question: str) -> str:
    """Ask the service, as a member of the project."""
    headers = {"Authorization": f"Bearer {os.environ['DSTACK_TOKEN']}"}
    reply = httpx.post(url, content=question, headers=headers, timeout=60)
    return reply.raise_for_status().text


@flow(on_cancellation=[stop_runs], on_crashed=[stop_runs])
def example_dstack_service(
    questions: tuple[str, ...] = ("What is a GPU?", "Who pays for it?"), port: int = 8417
) -> list[str]:
    """Serve, ask all questions, stop, and return the answers."""
    service = submit_run(
        Service(port=port, commands=[SERVER.replace("{port}", str(port))], python="3.11"),
        resources=Resources(gpu=GPU(memory="24GB")),
        # If Prefect itself is lost, the service ends here.
        max_duration="2h",
    )
    try:
        url = wait_for_service.with_options(timeout_seconds=1800)(service)
        return list(ask.map(unmapped(url), list(questions)).result())
    finally:
        stop_run(service)


if __name__ == "__main__":
    example_dstack_service()
