"""Reads an offline W&B run file: LevelDB-style blocks of protobuf records, parsed without wandb's own reader."""

import json
import struct
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path

from wandb.proto import wandb_internal_pb2

BLOCK = 32768


@dataclass
class Run:
    history: list = field(default_factory=list)
    summary: dict = field(default_factory=dict)
    config: dict = field(default_factory=dict)
    metrics: dict = field(default_factory=dict)
    alerts: list = field(default_factory=list)
    artifacts: list = field(default_factory=list)
    finished: bool = False

    def rows(self, key):
        return [row for row in self.history if key in row]


def read_run(folder: Path, patience: float = 10.0) -> Run:
    """The run in an `offline-run-*` folder, once its exit record is there."""
    file = next(Path(folder).glob("run-*.wandb"))
    deadline = time.monotonic() + patience
    while True:
        run = parse(file.read_bytes())
        if run.finished or time.monotonic() > deadline:
            return run
        time.sleep(0.05)


def parse(data: bytes) -> Run:
    run = Run()
    for payload in payloads(data):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(payload)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            run.history.append(merged({}, record.history.item))
        elif kind == "summary":
            merged(run.summary, record.summary.update)
        elif kind == "config":
            merged(run.config, record.config.update)
        elif kind == "run":
            merged(run.config, record.run.config.update)
        elif kind == "metric":
            run.metrics[record.metric.name or record.metric.glob_name] = record.metric
        elif kind == "alert":
            run.alerts.append(record.alert)
        elif kind == "artifact":
            run.artifacts.append(record.artifact)
        elif kind == "exit":
            run.finished = True
    return run


def payloads(data: bytes):
    position, parts = 7, []
    while position + 7 <= len(data):
        left = BLOCK - position % BLOCK
        if left < 7:
            position += left
            continue
        checksum, length, kind = struct.unpack_from("<IHB", data, position)
        body = data[position + 7 : position + 7 + length]
        if kind == 0 or len(body) < length:
            return
        assert zlib.crc32(bytes([kind]) + body) == checksum, "damaged record"
        parts.append(body)
        if kind in (1, 4):
            yield b"".join(parts)
            parts = []
        position += 7 + length


def merged(into: dict, items) -> dict:
    for item in items:
        path = list(item.nested_key) or [item.key]
        place = into
        for part in path[:-1]:
            place = place.setdefault(part, {})
        value = json.loads(item.value_json)
        if isinstance(value, dict) and isinstance(place.get(path[-1]), dict):
            deep_update(place[path[-1]], value)
        else:
            place[path[-1]] = value
    return into


def deep_update(into: dict, new: dict) -> None:
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            deep_update(into[key], value)
        else:
            into[key] = value
