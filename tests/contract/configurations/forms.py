"""Configurations made from dstack's own JSON schema: every key, in every form that the schema allows.

The schema defines what is a number, a choice, a list or an object. Where it only allows a text, `TEXTS` below adds
the meaning: a duration, a size, a range. A key that is new in the schema is generated without a change here; a text
that is not in `TEXTS` fails a test, so that it gets a meaning.

Forms that YAML or dstack reads differently from how they are written, such as a number as text and a text as number,
are mixed in, and so are some that dstack refuses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from hypothesis import strategies as st

Schema = Mapping[str, Any]
_PREFIX = "#/$defs/"


def _often(*good: Any, seldom: tuple[Any, ...] = ()) -> st.SearchStrategy[Any]:
    """Return one of the good forms, or, one time in ten, one that dstack refuses or reads in an unusual way."""
    times = max(1, 9 * len(seldom) // len(good))
    return st.sampled_from([*good * times, *seldom])


_DURATIONS = _often(
    "90", "90s", "5m", "2 h", "1d", "1w", "300s", "10m", seldom=("off", "0", "1.5h", "soon", "-1")
)
_SIZES = _often(
    "16GB", "16GB..", "..64GB", "16GB..80GB", "512MB..", "0.5TB", "16gb", "16 GB", "24", "8..", "16 GB .. 80 GB", "0.5GB",
    seldom=("16G", ".."),
)  # fmt: skip
_SIZE = _often("16GB", "512MB", "0.5TB", "16gb", "16 GB", "24", "2.5", seldom=("16G",))
_COUNTS = _often("1", "2..4", "..4", "2..", "0", "0..1", "1 .. 2", seldom=("4..2", "many"))
_COMMANDS = _often(
    "echo hello", "python train.py ${{ run.args }}", "echo ${{ secrets.token }}", "echo $${{ x }}", "a && b", "| x\ny", "",
    "echo $HOME", "echo 'ü'", seldom=("echo ${{ env.A }}", "echo ${{ x"),
)  # fmt: skip
_GPUS = _often(
    "24GB", "16GB..", "24GB..80GB:2", "A100", "A100:2", "A100:40GB:2", "nvidia:1..", "A100,H100:80GB..", "0",
    "tpu:v5litepod-8", "1..2", "2", "H100:8:nvidia", "A100 : 2", seldom=("amd:MI300X", "A100:A100", "tt:n150", ":"),
)  # fmt: skip
_NAMES = _often("a", "b-1", "main", "eu-west-1", "g6e.24xlarge", "p5.48xlarge", seldom=("x y", ""))
_GROUP_NAMES = _often("a", "b-1", "0", seldom=("B", "x y"))
_PATHS = _often("/data", "/a/b/", "/", seldom=("~/x", "x", "/a/../b", ""))
_WORDS = _often("x", "hello world", "7", "1.5", "true", "ü", "${{ secrets.a }}", "${{ env.A }}", "")
_TAGS = _often("x", "hello world", "7", "a/b:c@d", "", seldom=("ü",))

# The meaning of a text, by the object of the schema and its key ("" for the configuration itself), or by the key
# alone. The differences that WANTED names in the test are left out: a relative working_dir, `$$` without a reference,
# an empty path.
TEXTS: dict[str, st.SearchStrategy[str]] = {
    ".files": _often(".dstack.yml", ".dstack.yml:/x", ".dstack.yml:x/y", seldom=("missing", "a:b:c")),
    ".fleets": _often("f", "p/f", seldom=("/f", "a/b/c")),
    ".gateway": _often("g", "p/g", seldom=("/",)),
    ".instances": _NAMES,
    ".name": _often("train", "my-run", "a1", seldom=("a", "Train", "7")),
    ".replicas": _often("1", "2", "0", "3..3", seldom=("0..4", "2..", "many")),
    ".volumes": _often("data:/data", "/mnt/x:/x", seldom=("data:x", "data", "a:b:c")),
    "CPUSpec.count": _COUNTS,
    "DiskSpec.size": _SIZES,
    "EntityReference.name": _NAMES,
    "EntityReference.project": _NAMES,
    "FilePathMapping.local_path": _often(".dstack.yml", seldom=("missing",)),
    "FilePathMapping.path": _often("/x", "x", "~/x"),
    "FleetInstanceSelector.fleet": _often("f", "p/f"),
    "GPUSpec.compute_capability": _often("7.5", "8.0", seldom=("9", "x")),
    "GPUSpec.count": _COUNTS,
    "GPUSpec.memory": _SIZES,
    "GPUSpec.name": _often("A100", "h100", "RTX 4090", "tpu-v5e", "A100,H100", seldom=("MI300X",)),
    "GPUSpec.total_memory": _SIZES,
    "HTTPHeaderSpec.name": _often("Authorization", "X-A"),
    "HTTPHeaderSpec.value": _often("x", "Bearer ${{ env.A }}", "Bearer ${{ secrets.t }}", "$5", "$${{ x }}"),
    "HeaderPartitioningKey.header": _often("X-A", "X_B", seldom=("X A",)),
    "InstanceHostnameSelector.hostname": _often("10.0.0.1", "host", seldom=("",)),
    "InstanceMountPoint.instance_path": _PATHS,
    "InstanceMountPoint.path": _PATHS,
    "InstanceNameSelector.name": _NAMES,
    "NodeGroup.name": _GROUP_NAMES,
    "OpenAIChatModel.name": _WORDS,
    "OpenAIChatModel.prefix": _often("/v1", "/", "v1"),
    "ProbeConfig.body": _often("x", "${{ env.A }}", "{}", "$${{ x }}"),
    "ProbeConfig.interval": _DURATIONS,
    "ProbeConfig.timeout": _often("10s", "5", "1m", seldom=("1h", "0")),
    "ProbeConfig.url": _often("/", "/health?a=${{ env.A }}", "/$${{ x }}", seldom=("health",)),
    "ProfileRetry.duration": _DURATIONS,
    "Range_Memory_.max": _SIZE,
    "Range_Memory_.min": _SIZE,
    "RateLimit.prefix": _often("/", "/a", seldom=("a", "/a b")),
    "RegistryAuth.password": _often("p", "${{ env.A }}", "${{ secrets.p }}", "$$${{ env.A }}", "7"),
    "RegistryAuth.username": _often("u", "${{ env.A }}", "7"),
    "ReplicaGroup.name": _GROUP_NAMES,
    "ReplicaGroup.replicas": _often("1", "2", seldom=("0..4", "2..", "many")),
    "ResourcesSpec.cpu": _often(
        "4", "4..", "..8", "x86:4..", "4:x86", "x86", seldom=("arm:2..8", "6502:1", "arm : 2")
    ),
    "ResourcesSpec.disk": _SIZES,
    "ResourcesSpec.gpu": _GPUS,
    "ResourcesSpec.memory": _SIZES,
    "ResourcesSpec.shm_size": _SIZE,
    "ScalingSpec.scale_down_delay": _DURATIONS,
    "ScalingSpec.scale_up_delay": _DURATIONS,
    "ScalingSpec.window": _often("30s", "1m", "60", "300s", seldom=("7s",)),
    "Schedule.cron": _often("0 0 * * *", "*/5 * * * *", seldom=("daily",)),
    "TGIChatModel.name": _WORDS,
    "UtilizationPolicy.time_window": _often("10m", "1h", "300", seldom=("1m",)),
    "VolumeMountPoint.name": _NAMES,
    "VolumeMountPoint.path": _PATHS,
    "availability_zones": _NAMES,
    "chat_template": _WORDS,
    "commands": _COMMANDS,
    "entrypoint": _often("sh -c", "/bin/x", ""),
    "env": _WORDS,
    "eos_token": _WORDS,
    "home_dir": _PATHS,
    "idle_duration": _DURATIONS,
    "image": _often("ubuntu", "ghcr.io/a/b:1", "1.5"),
    "inactivity_duration": _DURATIONS,
    "init": _COMMANDS,
    "instance_types": _NAMES,
    "max_duration": _DURATIONS,
    "model": _WORDS,
    "regions": _NAMES,
    "reservation": _NAMES,
    "setup": _COMMANDS,
    "shell": _often("sh", "bash", "/usr/bin/zsh", seldom=("zsh",)),
    "stop_duration": _DURATIONS,
    "tags": _TAGS,
    "user": _often("root", "1000", "1000:1000", "a:b", seldom=("a:b:c", "")),
    "version": _often("1.106.0@8951cd3a", seldom=("abc", "1.2")),
    "working_dir": _often("/app", "/app/", "/", "~/x", "~"),
}
# A number in these keys would be a relative path.
_NO_NUMBERS = ("working_dir",)
# Texts that the schema describes by a pattern.
_PATTERNS: dict[str, st.SearchStrategy[str]] = {
    r"^([a-zA-Z_][a-zA-Z0-9_]*)(=.*$|$)": _often(
        "A=1", "C=", "HF_TOKEN", "B=x=y", "_c=ü", "lower=1", seldom=("A = 1", "1A=2", "MISSING")
    ),
    r"^[0-9]+:[0-9]+$": _often("80:8000", "8000", seldom=("*:80", "0:1")),
    r"^(?:[0-9]+|\*):[0-9]+$": _often("80:8000", "*:8000", "8000", seldom=("a:1",)),
}
# `repos` needs a remote, which the tests of repositories have. `env: {A: {key: B}}` is how dstack's client stores a
# name without a value.
_LEFT_OUT = ("type", "repos")
_OBJECTS_LEFT_OUT = ("RepoSpec", "EnvSentinel")
# Without these keys most configurations would have nothing to run.
_ALWAYS = {"task": ("commands",), "service": ("commands", "port"), "dev-environment": ()}


def texts_in(schema: Schema) -> Iterator[tuple[str, str]]:
    """Yield the object and the key of each text that the schema does not describe further."""
    for where, properties in _objects(schema):
        for key, described in properties.items():
            if key not in _LEFT_OUT and any(_is_plain_text(part) for part in _parts(described, schema)):
                yield where, key


def text_for(where: str, key: str) -> st.SearchStrategy[str] | None:
    """Return the texts of a key, or None if it is not in `TEXTS`."""
    return TEXTS.get(f"{where}.{key}", TEXTS.get(key))


def configurations(kind: str, schema: Schema) -> st.SearchStrategy[str]:
    """Return configurations of a type as YAML."""
    maker = _Maker(schema)
    keys = [key for key in schema["properties"] if key not in _LEFT_OUT]

    @st.composite
    def made(draw: st.DrawFn) -> str:
        chosen = draw(st.lists(st.sampled_from(keys), max_size=5, unique=True))
        if "groups" not in chosen:
            chosen += [key for key in _ALWAYS[kind] if key not in chosen]
        values = {key: draw(maker.value("", key, schema["properties"][key])) for key in chosen}
        if kind == "service":
            values.setdefault("port", 8000)
        return yaml.safe_dump({"type": kind, **values}, sort_keys=False)

    return made()


class _Maker:
    """The strategies for the parts of one schema."""

    def __init__(self, schema: Schema) -> None:
        self._definitions = schema.get("$defs", {})

    def value(self, where: str, key: str, schema: Schema) -> st.SearchStrategy[Any]:
        """Return the values of a key."""
        return st.deferred(lambda: self._of(where, key, schema))

    def _of(self, where: str, key: str, schema: Schema) -> st.SearchStrategy[Any]:
        if "$ref" in schema:
            name = schema["$ref"].removeprefix(_PREFIX)
            return self._of(
                name if "properties" in self._definitions[name] else where, key, self._definitions[name]
            )
        options = schema.get("anyOf") or schema.get("oneOf")
        if options:
            left = [
                option
                for option in options
                if option.get("$ref", "").removeprefix(_PREFIX) not in _OBJECTS_LEFT_OUT
            ]
            return st.one_of([self._of(where, key, option) for option in left])
        if "const" in schema:
            return st.just(schema["const"])
        if "enum" in schema:
            return _often(*schema["enum"], seldom=_close_to(schema["enum"]))
        if schema["type"] == "object" and "properties" in schema:
            return self._object(where, schema)
        if schema["type"] == "object":
            value = self._of(where, key, schema["additionalProperties"])
            return st.dictionaries(_often("A", "b_1", "TEAM", "D", seldom=("x y",)), value, max_size=3)
        if schema["type"] == "array":
            items = self._of(where, key, schema["items"])
            return st.lists(items, min_size=min(1, schema.get("minItems", 0)), max_size=3)
        return self._scalar(where, key, schema)

    def _object(self, where: str, schema: Schema) -> st.SearchStrategy[Any]:
        properties = {key: self.value(where, key, part) for key, part in schema["properties"].items()}
        needed = schema.get("required", [])
        return st.fixed_dictionaries(
            {key: properties[key] for key in needed},
            optional={key: value for key, value in properties.items() if key not in needed},
        )

    def _scalar(self, where: str, key: str, schema: Schema) -> st.SearchStrategy[Any]:
        kind = schema["type"]
        if kind == "null":
            return st.none()
        if kind == "boolean":
            return _often(True, False, seldom=("yes", "off", 1, 2))
        if kind == "string":
            if schema.get("pattern") in _PATTERNS:
                return _PATTERNS[schema["pattern"]]
            text = text_for(where, key)
            assert text is not None, f"{where}.{key} has no meaning in TEXTS"
            if key in _NO_NUMBERS:
                return text
            return _often(0, 0, 0, 0, 0, seldom=(7, 1.5)).flatmap(
                lambda number: st.just(number) if number else text
            )
        low = schema.get("minimum", schema.get("exclusiveMinimum", -1))
        high = schema.get("maximum", 100)
        good = [low + 1, min(high, 8000), 1]
        odd = [low, high if high < 1e9 else 5, "2", "x", 2.0, 2.5]
        return _often(*good, *([2.5, 0.5] if kind == "number" else []), seldom=tuple(odd))


def _close_to(choices: list[Any]) -> tuple[Any, ...]:
    """Return variants that users write for a choice, and those that YAML makes of it."""
    # YAML reads a version as a number.
    numbers = [float(choice) for choice in choices if choice.replace(".", "", 1).isdigit()]
    return (choices[0].upper(), f" {choices[0]}", *numbers)


def _objects(schema: Schema) -> Iterator[tuple[str, Schema]]:
    yield "", schema["properties"]
    for name, definition in schema.get("$defs", {}).items():
        if "properties" in definition and name not in _OBJECTS_LEFT_OUT:
            yield name, definition["properties"]


def _parts(schema: Schema, root: Schema) -> Iterator[Schema]:
    """Yield a part of a schema and its alternatives, except objects, which have keys of their own."""
    if "$ref" in schema:
        definition = root["$defs"][schema["$ref"].removeprefix(_PREFIX)]
        if "properties" not in definition:
            yield from _parts(definition, root)
        return
    yield schema
    for option in [*schema.get("anyOf", []), *schema.get("oneOf", [])]:
        yield from _parts(option, root)
    for inner in ("items", "additionalProperties"):
        if isinstance(schema.get(inner), Mapping):
            yield from _parts(schema[inner], root)


def _is_plain_text(schema: Schema) -> bool:
    return schema.get("type") == "string" and not {"const", "enum", "pattern"} & schema.keys()
