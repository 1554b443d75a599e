"""The environment variables that dstack documents for every job."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def job_variables(submission: Mapping[str, Any], hostfile: Path) -> dict[str, str]:
    """Return the variables for what the server submitted, and write the MPI hostfile they name."""
    spec = submission["job_spec"]
    run = submission.get("run") or {}
    run_spec = run.get("run_spec") or submission["run_spec"]
    cluster = submission.get("cluster_info") or {}
    addresses = cluster.get("job_ips") or []
    nodes = spec.get("jobs_per_replica") or 1
    gpus = cluster.get("gpus_per_job") or 0
    gpus_by_node = cluster.get("gpus_per_node") or [gpus] * nodes
    hostfile.write_text(
        "".join(
            f"{address} slots={count}\n" if count else f"{address}\n"
            for address, count in zip(addresses, gpus_by_node, strict=False)
        )
    )
    variables = {
        "DSTACK_RUN_NAME": run_spec.get("run_name"),
        "DSTACK_RUN_ID": run.get("id"),
        "DSTACK_JOB_ID": (submission.get("job_submission") or {}).get("id"),
        "DSTACK_REPO_ID": run_spec.get("repo_id"),
        "DSTACK_NODE_RANK": spec.get("job_num") or 0,
        "DSTACK_NODES_NUM": nodes,
        "DSTACK_NODES_IPS": "\n".join(addresses),
        "DSTACK_MASTER_NODE_IP": cluster.get("master_job_ip") or "",
        "DSTACK_GPUS_PER_NODE": gpus,
        "DSTACK_GPUS_NUM": sum(gpus_by_node),
        "DSTACK_MPI_HOSTFILE": hostfile,
    }
    return {name: str(value) for name, value in variables.items() if value is not None}
