"""Configurations written by hand: one for each form that our client once read differently from dstack's.

The names are those of the tests. Source of the forms: dstack's documentation and its examples.
"""

from __future__ import annotations

from tests.contract.configurations.clients import Case


def task(*lines: str, commands: str = "[echo hello]") -> str:
    """Return a task with these lines."""
    return "\n".join(["type: task", f"commands: {commands}", *lines]) + "\n"


def service(*lines: str) -> str:
    """Return a service with these lines."""
    return "\n".join(["type: service", "port: 8000", "commands: [serve]", *lines]) + "\n"


_PRICE = "profiles: [{name: cheap, max_price: 1, default: true}, {name: big, max_price: 90, regions: [eu]}]\n"
_LOCAL_REPLICAS = (
    "groups: [{replicas: 1, commands: [a]}, {name: big, replicas: 2, resources: {gpu: 1}, commands: [b]}]"
)

NAMED: dict[str, Case] = {
    # 1. Environment variables.
    "env: a name from the process": Case(task("env: [HF_TOKEN]"), environment={"HF_TOKEN": "s"}),
    "env: a name from the arguments": Case(task("env: [HF_TOKEN]"), env={"HF_TOKEN": "s"}),
    "env: a name that is empty in the process": Case(task("env: [HF_TOKEN]"), environment={"HF_TOKEN": ""}),
    "env: arguments before the process": Case(
        task("env: [HF_TOKEN]"), env={"HF_TOKEN": "s"}, environment={"HF_TOKEN": "t"}
    ),
    "env: arguments before the file": Case(task("env: [A=1, B=2]"), env={"B": "3", "C": "4"}),
    "env: a missing name": Case(task("env: [NOWHERE_TO_BE_FOUND]")),
    "env: a mapping": Case(task("env: {A: 1, B: x, C: 1.5, D: ''}")),
    "env: a mapping without a value": Case(task("env: {A: }"), env={"A": "s"}),
    "env: a mapping of a truth value": Case(task("env: {A: true}")),
    "env: a mapping of an odd name": Case(task("env: {'A B': x}")),
    "env: a value with equal signs": Case(task("env: ['A=b=c', 'E=']")),
    "env: a name twice": Case(task("env: [A=1, A=2]")),
    "env: a space before the equal sign": Case(task("env: ['A = 1']")),
    "env: a name that begins with a digit": Case(task("env: ['1A=2']")),
    "env: a dash in a name": Case(task("env: ['A-B=2']")),
    "env: a value of several lines": Case(task("env:", '- "A=1\\n2"')),
    "env: a number as an item": Case(task("env: [42]")),
    "env: a secret": Case(task("env: ['A=${{ secrets.a }}']")),
    "env: a reference to another variable": Case(task("env: ['A=${{ env.B }}', B=1]")),
    # 2. References.
    "references: registry_auth": Case(
        task(
            "env: [TOKEN]",
            "image: i",
            "registry_auth: {username: '${{ env.USER_NAME }}', password: '${{ env.TOKEN }}'}",
        ),
        env={"USER_NAME": "u"},
        environment={"TOKEN": "t"},
    ),
    "references: registry_auth of a secret": Case(
        task("image: i", "registry_auth: {username: u, password: '${{ secrets.token }}'}")
    ),
    "references: registry_auth of a missing variable": Case(
        task("image: i", "registry_auth: {username: u, password: '${{ env.NOWHERE }}'}")
    ),
    "references: a probe": Case(
        service(
            "env: [TOKEN=t, BODY=b]",
            "probes:",
            "- {type: http, url: '/a/${{ env.TOKEN }}', method: post, body: 'x${{ env.BODY }}', "
            "headers: [{name: Authorization, value: 'Bearer ${{ env.TOKEN }}'}]}",
        )
    ),
    "references: a probe of a missing variable": Case(
        service("probes: [{type: http, url: '/${{ env.NOWHERE }}'}]")
    ),
    "references: a probe with the escape": Case(
        service("probes: [{type: http, url: '/$${{ env.NOWHERE }}'}]")
    ),
    "references: arguments": Case(
        task(commands="['train ${{ run.args }}']"), args=["--lr", "0.1", "a b", "it's"]
    ),
    "references: arguments, none given": Case(task(commands="['train ${{ run.args }} end']")),
    "references: arguments that no command wants": Case(task(), args=["--lr", "1"]),
    "references: arguments in a service": Case(
        "type: service\nport: 80\ncommands: ['serve ${{run.args}}']\n", args=["-v"]
    ),
    "references: arguments in groups": Case(
        "type: task\ngroups: [{commands: ['a ${{ run.args }}']}, {commands: [b], nodes: 2}]\n", args=["x"]
    ),
    "references: the escape in a command": Case(
        task(commands="['echo $${{ run.args }} $$PATH $PATH $$$HOME']")
    ),
    "references: a dollar without a reference": Case(task(commands="['echo $HOME $5 ${A} $$ $']")),
    "references: an escaped dollar without a reference": Case(task(commands="['kill $$']")),
    "references: a secret in a command": Case(task(commands="['echo ${{ secrets.a }}']")),
    "references: a variable in a command": Case(task("env: [A=1]", commands="['echo ${{ env.A }}']")),
    "references: an unknown namespace in a command": Case(task(commands="['echo ${{ github.sha }}']")),
    "references: without a namespace": Case(task(commands="['echo ${{ x }}']")),
    "references: without an end": Case(task(commands="['echo ${{ run.args']")),
    "references: an address of a group": Case(
        "type: task\ngroups: [{nodes: 1, commands: ['echo ${{ groups[0].nodes[0].IP_ADDRESS }}']}]\n"
    ),
    "references: a bad address of a group": Case(task(commands="['echo ${{ groups[x].nodes }}']")),
    "references: an init command of a dev environment": Case(
        "type: dev-environment\ninit: ['echo ${{ run.args }} $$x']\n"
    ),
    # 3. Numbers, texts and what is required.
    "python 3.10 as YAML reads it": Case(task("python: 3.10")),
    "python 3.1": Case(task("python: '3.1'")),
    "python 3.12 as a number": Case(task("python: 3.12")),
    "python 3.8": Case(task("python: 3.8")),
    "python 3": Case(task("python: 3")),
    "replicas: a number": Case(service("replicas: 2")),
    "replicas: a number as text": Case(service("replicas: '2'")),
    "replicas: a range": Case(service("replicas: 0..4", "scaling: {metric: rps, target: 10}")),
    "replicas: a range without scaling": Case(service("replicas: 0..4")),
    "replicas: a list of groups": Case(
        "type: service\nport: 8000\nreplicas: [{count: 1, commands: [a]}, {replicas: 2, commands: [b]}]\n"
    ),
    "groups of a service": Case(f"type: service\nport: 8000\n{_LOCAL_REPLICAS}\n"),
    "groups and replicas": Case(f"type: service\nport: 8000\nreplicas: 1\n{_LOCAL_REPLICAS}\n"),
    "groups and commands": Case(service(_LOCAL_REPLICAS)),
    "groups of a service with a router": Case(
        "type: service\nport: 8000\ngroups: [{replicas: 1, commands: [a], router: {type: smg}}, "
        "{replicas: 1..3, scaling: {metric: rps, target: 2}, commands: [b]}]\n"
    ),
    "groups of a task": Case(
        "type: task\ngroups: [{commands: [a]}, {name: w, nodes: 2, commands: [b], ports: [80]}]\n"
    ),
    "groups of a task and nodes": Case("type: task\nnodes: 2\ngroups: [{commands: [a]}]\n"),
    "max_price as text": Case(task("max_price: '2.5'")),
    "max_price as a number": Case(task("max_price: 2.5")),
    "max_price of nothing": Case(task("max_price: 0")),
    "max_price as another text": Case(task("max_price: cheap")),
    "nodes as text": Case(task("nodes: '2'")),
    "nodes as a fraction": Case(task("nodes: 2.5")),
    "nodes as a whole fraction": Case(task("nodes: 2.0")),
    "priority as text": Case(task("priority: '7'")),
    "privileged as text": Case(task("privileged: 'yes'")),
    "a command that is a number": Case(task(commands="[42, 1.5]")),
    "a command that is a truth value": Case(task(commands="[true]")),
    "a command that is a mapping, for want of quotes": Case(task(commands="[{echo: hello}]")),
    "one command that is not a list": Case(task(commands="echo hello")),
    "no commands": Case("type: task\n"),
    "an image alone": Case("type: task\nimage: ubuntu\n"),
    "a name that is a number": Case(task("name: 123")),
    "a user that is a number": Case(task("user: 1000")),
    "a user with a group": Case(task("user: 1000:1000")),
    "a tag that is a number": Case(task("tags: {team: 7}")),
    "a region that is a number": Case(task("regions: [1]")),
    "idle_duration 0": Case(task("idle_duration: 0")),
    "idle_duration off": Case(task("idle_duration: off")),
    "idle_duration -1": Case(task("idle_duration: -1")),
    "max_duration off": Case(task("max_duration: off")),
    "max_duration true": Case(task("max_duration: true")),
    "max_duration 0": Case(task("max_duration: 0")),
    "max_duration with a space": Case(task("max_duration: 5 m")),
    "max_duration in words": Case(task("max_duration: long")),
    "stop_duration as text of a number": Case(task("stop_duration: '90'")),
    "retry true": Case(task("retry: true")),
    "retry false": Case(task("retry: false")),
    "retry on events": Case(task("retry: {on_events: [no-capacity, error], duration: 1h}")),
    "retry on nothing": Case(task("retry: {on_events: []}")),
    "retry on an unknown event": Case(task("retry: {on_events: [rain]}")),
    "no type": Case("commands: [echo]\n"),
    "an unknown type": Case("type: job\ncommands: [echo]\n"),
    "an unknown key": Case(task("comands: [x]")),
    "an unknown key of resources": Case(task("resources: {gpus: 1}")),
    "python and image": Case(task("python: 3.12", "image: i")),
    "docker and image": Case(task("docker: true", "image: i")),
    "an empty file": Case(""),
    # 4. Directories, repositories and files.
    "working_dir absolute": Case(task("working_dir: /app")),
    "working_dir in the home": Case(task("working_dir: ~/x")),
    "working_dir relative": Case(task("working_dir: src")),
    "files: a path": Case(task("files: [.dstack.yml]")),
    "files: two paths": Case(task("files: ['.dstack.yml:/x/y']")),
    "files: a mapping": Case(task("files: [{local_path: .dstack.yml, path: ~/x}]")),
    "files: a missing path": Case(task("files: [not-there]")),
    "files: an empty path": Case(task("files: [{local_path: .dstack.yml, path: ''}]")),
    "volumes: a network volume": Case(task("volumes: ['data:/data']")),
    "volumes: a directory of the host": Case(task("volumes: ['/mnt/data:/data']")),
    "volumes: mappings": Case(
        task("volumes: [{name: [a, b], path: /x}, {instance_path: /m, path: /y, optional: true}]")
    ),
    "volumes: a relative path": Case(task("volumes: ['data:x']")),
    # 5. Resources.
    "gpu: a size": Case(task("resources: {gpu: 16GB}")),
    "gpu: a size and more": Case(task("resources: {gpu: 16GB..}")),
    "gpu: a name, a size and a count": Case(task("resources: {gpu: 'A100:40GB:2'}")),
    "gpu: two names": Case(task("resources: {gpu: 'A100,H100:80GB..'}")),
    "gpu: a count": Case(task("resources: {gpu: 1}")),
    "gpu: no GPU": Case(task("resources: {gpu: 0}")),
    "gpu: a vendor": Case(task("image: i", "resources: {gpu: 'amd:MI300X:1..8'}")),
    "gpu: a mapping": Case(
        task(
            "resources: {gpu: {name: H100, memory: 40GB..80GB, count: '2..', total_memory: 80, compute_capability: 7.5}}"
        )
    ),
    "gpu: null": Case(task("resources: {gpu: null}")),
    "memory and disk": Case(task("resources: {memory: 16GB.., disk: 200GB, shm_size: 512MB, cpu: 4..}")),
    "memory and disk as numbers": Case(task("resources: {memory: 16, disk: 200, shm_size: 1.5, cpu: 4}")),
    "cpu: an architecture": Case(task("resources: {cpu: 'x86:4..8'}")),
    "cpu: a range as a mapping": Case(task("resources: {cpu: {min: 4}}")),
    "disk: null": Case(task("resources: {disk: null}")),
    # 6. Profiles.
    "profiles: the default one": Case(task(), profiles=_PRICE),
    "profiles: a named one": Case(task(), profiles=_PRICE, profile="big"),
    "profiles: one that the environment names": Case(
        task(), profiles=_PRICE, environment={"DSTACK_PROFILE": "big"}
    ),
    "profiles: an unknown one": Case(task(), profiles=_PRICE, profile="huge"),
    "profiles: none by the environment": Case(
        task(), profiles=_PRICE, environment={"DSTACK_NO_PROFILE": "1"}
    ),
    "profiles: the configuration goes first": Case(task("max_price: 5"), profiles=_PRICE, profile="big"),
    "profiles: all keys": Case(
        task(),
        profiles="profiles:\n- name: all\n  default: true\n  backends: [aws]\n  instance_types: [a]\n  spot_policy: auto\n"
        "  retry: {on_events: [error], duration: 1h}\n  max_duration: off\n  stop_duration: 5m\n  creation_policy: reuse\n"
        "  idle_duration: off\n  utilization_policy: {min_gpu_utilization: 10, time_window: 10m}\n  fleets: [a, p/b]\n"
        "  tags: {a: b}\n  schedule: {cron: '0 0 * * *'}\n  startup_order: any\n  stop_criteria: all-done\n",
    ),
    "profiles: a broken file": Case(task(), profiles="profiles: [{name: x, colour: red}]\n"),
    # 7. Others.
    "schedule: one": Case(task("schedule: {cron: '*/5 * * * *'}")),
    "schedule: a list": Case(task("schedule: {cron: ['0 1 * * *', '0 2 * * *']}")),
    "schedule: a wrong one": Case(task("schedule: {cron: daily}")),
    "ports": Case(task("ports: [8000, '80:8001', '*:8002', {container_port: 8003}]")),
    "port of a service as text": Case("type: service\nport: '8000'\ncommands: [x]\n"),
    "port of a service as a mapping text": Case("type: service\nport: '80:8000'\ncommands: [x]\n"),
    "fleets and instances": Case(
        task("fleets: [a, p/b, {name: c}]", "instances: [i, {hostname: h}, {fleet: f, instance: 1}]")
    ),
    "a model by its name": Case(service("model: llama")),
    "a model as a mapping": Case(service("model: {name: llama, format: tgi}")),
    "rate limits": Case(
        service("rate_limits: [{prefix: /a, rps: 5, burst: 2, key: {type: header, header: X-A}}]")
    ),
    "a gateway by its name": Case(service("gateway: g")),
    "no gateway": Case(service("gateway: false")),
    "https auto": Case(service("https: auto")),
    "an empty list of probes": Case(service("probes: []")),
    "a dev environment": Case(
        "type: dev-environment\nide: vscode\nversion: abc\ninactivity_duration: 2h\ninit: [a]\n"
    ),
    "a dev environment without an IDE": Case("type: dev-environment\n"),
    "dstack": Case(task("dstack: true")),
    "backend options": Case(task("backend_options: [{type: vastai, min_score: 3}]")),
}
