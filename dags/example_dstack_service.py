"""Start an inference service, use it in tasks, and stop it whatever happens to them.

``serve`` is the setup: it succeeds once the service answers, and returns its address; when it fails, it stops
the service itself. ``stop`` is the teardown: it runs also when a task in between failed. Needs the
connection ``dstack_default``.
"""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG, task

from airflow_provider_dstack.services import DstackServiceOperator, DstackStopRunOperator
from dstack_core import GPU, Resources, Service

# A stand-in for an inference server: it returns each request's body.
SERVER = """
python3 -u - <<'END'
import http.server

class Echo(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"echo: " + body)

http.server.HTTPServer(("", 8417), Echo).serve_forever()
END
"""

with DAG("example_dstack_service", schedule=None, tags=["example", "dstack"], doc_md=__doc__) as dag:
    serve = DstackServiceOperator(
        task_id="serve",
        configuration=Service(port=8417, commands=[SERVER], python="3.11"),
        run_resources=Resources(gpu=GPU(memory="24GB")),
        # If Airflow itself is lost, the service ends here.
        max_duration="2h",
        execution_timeout=timedelta(minutes=30),
        poll_interval=2.0,
    )
    stop = DstackStopRunOperator(task_id="stop", runs_of=serve, poll_interval=2.0)

    @task
    def ask(url: str, question: str) -> str:
        """Send a request to the service, as a member of the project."""
        import requests

        from airflow_provider_dstack.hooks import DstackHook

        reply = requests.post(url, question, headers=DstackHook().headers(), timeout=60)
        reply.raise_for_status()
        return reply.text

    answers = ask.partial(url=serve.output).expand(question=["What is a GPU?", "Who pays for it?"])
    answers >> stop.as_teardown(setups=serve)
