"""result.json: the record of a run that came to its end."""

import json
import socket
import statistics

import jax

from xformers_lab import config as configs
from xformers_lab.measure import speed
from xformers_lab.measure.memory import device_peak_bytes
from xformers_lab.record import ABSENT, Record, sealed
from xformers_lab.tasks import Task
from xformers_lab.train import evaluation, hosts, initial, longer, parts, provenance, records
from xformers_lab.train.jobs import Job
from xformers_lab.train.layout import Compiled
from xformers_lab.train.log import Log, curve
from xformers_lab.train.state import TrainState, merge


def write(job: Job, state: TrainState, compiled: Compiled, log: Log, peak: int | None, **outcome) -> dict:
    """Write result.json -> the record."""
    config = job.config
    shared = speed.shared()
    seconds = [line["seconds"] for line in log.lines if line.get("seconds") and not shared]
    median = statistics.median(seconds) if seconds else None
    validated = [line for line in log.lines if "validation_loss" in line]
    of, wanted = job.task.examples("validation"), config.train.eval_batches
    env = records.read_json(job.run_dir / "env.json") or {}
    record = Record(
        id=configs.identity(config),
        run_dir=str(job.run_dir),
        kind="compare",
        **(
            dict.fromkeys(("loss", "metric", "metric_interval", "examples", "examples_of", "majority"))
            | {"step": int(state.step)}
            | outcome
        ),
        **declared(job.task),
        tokens_per_second=config.train.batch * config.seq_len / median if median else None,
        seconds_min=min(seconds, default=None),
        seconds_median=median,
        **speed.disturbance(seconds),
        compile_seconds=None if shared else compiled.compile_seconds,
        kernel=compiled.kernel,
        untimed=shared or ABSENT,
        flops=compiled.flops,
        flops_per_token=compiled.flops / (config.train.batch * config.seq_len) if compiled.flops else None,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        embedding_parameters=parts.of_words(merge(job.graph, state.params, state.extra, state.memory)),
        temp_bytes=compiled.temp_bytes,
        **_peak(compiled, peak),
        steps=int(state.step),
        skipped=int(state.skipped),
        curve=curve(log.lines),
        validation=[[line["step"], line["validation_loss"], line["validation_metric"]] for line in validated],
        validation_examples=evaluation.amount(of, wanted, evaluation.WATCHED) if validated else None,
        averaged=ABSENT if config.train.ema is None else config.train.ema,
        initialised=ABSENT if config.init is None else records.read_json(job.run_dir / initial.INITIALISED) or {},
        extended=records.read_json(job.run_dir / longer.EXTENDED) or ABSENT,
        data=job.task.describe(),
        devices=job.layout.mesh.size,
        host=socket.gethostname(),
        device=jax.devices()[0].device_kind,
        processes=hosts.processes(),
        hosts=hosts.machines(),
        started=env.get("started"),
        ended=provenance.now(),
        git=env.get("git"),
        machine=speed.machine(),
        config=configs.to_dict(config),
    ).to_dict()
    record = sealed(records.finite(json.loads(json.dumps(record))))
    records.write_json(job.run_dir / "result.json", record)
    return record


def declared(task: Task) -> dict:
    names = {"metric_name": task.metric_name, "higher_is_better": task.higher_is_better}
    return names | {"chance": task.chance, "plane": task.image}


def _peak(compiled: Compiled, before: int | None) -> dict:
    """The device's own peak, where it is this run's; a process that held more before only has the compiled figure."""
    after = device_peak_bytes()
    if before is None or after is None:
        return {}
    return {"peak_bytes": after if after > before else compiled.peak_bytes}
