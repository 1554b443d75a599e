"""Realistic configurations: one for each form that dstack's documentation shows.

dstack 0.22.5's own client accepts all of them. ``ENV`` has a value for each name that they do not define.
"""

from __future__ import annotations

ENV = {"HF_TOKEN": "hf_x", "WANDB_API_KEY": "w", "NGC_API_KEY": "n"}

FILES = {
    "a fine-tuning with names of variables": """
type: task
name: finetune
python: 3.10
nvcc: true
env:
  - HF_TOKEN
  - WANDB_API_KEY
  - ACCELERATE_LOG_LEVEL=info
commands:
  - uv pip install -r requirements.txt
  - python train.py ${{ run.args }}
resources:
  gpu: A100:40GB..80GB:1..8
  shm_size: 24GB
  disk: 200GB..
""",
    "distributed nodes": """
type: task
name: nodes
nodes: 2
startup_order: workers-first
stop_criteria: master-done
image: nvcr.io/nvidia/pytorch:25.05-py3
commands:
  - torchrun --nnodes $DSTACK_NODES_NUM --node-rank $DSTACK_NODE_RANK train.py
ports: [6006, "8888:8888", "*:9000"]
resources:
  gpu: nvidia:80GB:8
""",
    "groups of nodes": """
type: task
groups:
  - name: head
    commands: ["python head.py ${{ groups[1].nodes[0].IP_ADDRESS }}"]
  - name: workers
    nodes: 2
    resources: {gpu: 24GB..}
    commands: [python worker.py]
""",
    "a private image": """
type: service
name: nim
image: nvcr.io/nim/meta/llama3-8b-instruct:latest
env: [NGC_API_KEY, NIM_MAX_MODEL_LEN=4096]
registry_auth:
  username: $oauthtoken
  password: ${{ env.NGC_API_KEY }}
commands: [/opt/nim/start.sh]
port: 8000
model: meta/llama3-8b-instruct
volumes:
  - instance_path: /root/.cache/nim
    path: /opt/nim/.cache
    optional: true
resources: {gpu: 24GB..}
""",
    "a service that scales": """
type: service
image: vllm/vllm-openai:latest
env: {HF_TOKEN: "${{ secrets.hf_token }}", MODEL: llama}
commands:
  - vllm serve $MODEL --port 8000
port: 8000
auth: false
https: auto
replicas: 0..4
scaling: {metric: rps, target: 10, scale_up_delay: 2m}
rate_limits:
  - {prefix: /v1/, rps: 4, burst: 9, key: {type: header, header: Authorization}}
probes:
  - type: http
    url: /health
    method: post
    headers: [{name: X-Key, value: "${{ env.MODEL }}"}]
    interval: 15s
    ready_after: 2
""",
    "replicas of several kinds": """
type: service
port: 8000
image: lmsysorg/sglang:latest
replicas:
  - count: 1
    commands: ["python -m sglang_router --policy ${{ run.args }}"]
    resources: {cpu: 4}
  - count: 1..4
    scaling: {metric: rps, target: 3}
    commands: [python -m sglang.launch_server]
    resources: {gpu: H200}
""",
    "groups of replicas": """
type: service
port: 8000
groups:
  - name: prefill
    replicas: 1
    python: 3.12
    commands: [serve prefill]
  - replicas: 2
    commands: [serve decode]
""",
    "a dev environment": """
type: dev-environment
name: vscode
python: "3.12"
ide: vscode
init: [uv pip install wandb]
env: [HF_TOKEN]
inactivity_duration: 2h
max_duration: off
resources: {gpu: 24GB, cpu: x86:8.., memory: 64GB..}
""",
    "a bare dev environment": "type: dev-environment\n",
    "Docker in the run": """
type: task
docker: true
commands:
  - docker compose up -d
  - docker ps --format '{{.Names}}'
privileged: true
""",
    "where and how long": """
type: task
commands: [nvidia-smi]
backends: [aws, gcp]
regions: [us-east-1]
availability_zones: [us-east-1a]
instance_types: [p5.48xlarge]
spot_policy: auto
retry: {on_events: [no-capacity, interruption, error], duration: 1h}
max_price: "98.5"
max_duration: 1d
stop_duration: 10m
idle_duration: 0
creation_policy: reuse-or-create
utilization_policy: {min_gpu_utilization: 20, time_window: 30m}
priority: 50
tags: {team: ml}
""",
    "every night": """
type: task
schedule: {cron: ["0 1 * * *", "0 13 * * 1"]}
commands: [python nightly.py]
retry: true
""",
    "directories": """
type: task
working_dir: ~/code
user: 1000:1000
shell: bash
commands: [pwd]
volumes: [/mnt/data:/data]
""",
    "a TPU": """
type: task
python: "3.11"
commands: [python -c 'print(1)']
resources: {gpu: v5litepod-8}
""",
    "numbers where a text is meant": """
type: task
image: ubuntu
entrypoint: /bin/sh -c
commands: [42, 1.5]
env: {PORT: 8000, RATE: 0.5}
nodes: "1"
""",
}
