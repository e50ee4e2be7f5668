"""What a run was, in words: a few fixed rules over its record. Each finding says the numbers it rests on."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gmar_lightning.monitor.history import History
from gmar_lightning.monitor.record import ProbeRecord
from gmar_lightning.show.evidence import fixed_region
from gmar_lightning.show.metric_names import accuracy_name, loss_name

ALARMS = ("nonfinite", "diverged", "collapse", "layer_vanishing", "nothing_learned")
# Every kind of finding, in the order of the headline, and what its rule asks.
FINDINGS = {
    "nonfinite": "importance was NaN or infinite at a probe",
    "diverged": "the loss ended above twice its lowest value and more than half the way back, or was not finite",
    "collapse": "heads still collapsed at the end",
    "layer_vanishing": "a layer still without gradient at the end",
    "nothing_learned": "accuracy gained less than 2 points and the loss fell less than 5 %",
    "shortcut": "heat in one spot of every image",
    "too_early": "fewer than 6 good probes",
    "dominance": "a head that holds most of its layer at the end",
    "failed_probes": "a probe failed",
    "drift": "median rank correlation with the first maps below 0.3",
    "recovered": "a collapse was followed by recovery",
    "dormant": "a head that never came alive",
    "global_shrink": "gradients of nearly all layers shrank together",
}

# a loss counts as diverged above this multiple of its lowest value, once half the way back to the start
LOSS_FACTOR = 2.0
# less than this gain in accuracy, and less than this fall of the loss, is nothing learned
ACCURACY_GAIN, LOSS_FALL = 0.02, 0.05
# the detector warms up for 5 probes: with fewer, silence means nothing
LEAST_PROBES = 6
# explanations have drifted away when their patches' order has lost most of its likeness to the first probe
DRIFT_LIMIT = 0.3

_HEADLINES = {
    "nonfinite": "not finite",
    "diverged": "diverged",
    "collapse": "heads collapsed",
    "layer_vanishing": "layer vanished",
    "nothing_learned": "nothing learned",
    "shortcut": "shortcut-like evidence",
    "too_early": "too early to say",
}


@dataclass(frozen=True)
class Finding:
    """One thing that a rule found.

    Attributes:
        kind: One of `FINDINGS`.
        text: A sentence with the numbers it rests on.
        figures: The same numbers by name, for programs.
    """

    kind: str
    text: str
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class HeadCollapse:
    """A head's collapse: where, when it was called, since when, and when it recovered (None: it did not)."""

    layer: int
    head: int
    layer_name: str
    step: int
    since_step: int
    recovered_step: int | None


@dataclass(frozen=True)
class Verdict:
    """A run in words: `headline` (`healthy` when no rule of `ALARMS` fired) and what was found."""

    headline: str
    findings: tuple[Finding, ...]

    @property
    def healthy(self) -> bool:
        """Whether no alarm fired."""
        return not any(finding.kind in ALARMS for finding in self.findings)

    def has(self, kind: str) -> bool:
        """Whether a finding of this kind is among the findings."""
        return any(finding.kind == kind for finding in self.findings)


def judge(history: History) -> Verdict:
    """The verdict on a run.

    Rules, in order of the headline: `nonfinite` (importance was NaN or infinite at a probe), `diverged`
    (the loss ended above twice its lowest value and more than half the way back to where it began, or was
    not finite), `collapse` (heads still collapsed at the end), `layer_vanishing` (a layer still without
    gradient at the end), `nothing_learned` (accuracy gained less than 2 points and the loss fell less than
    5 %). Without an alarm, heat in one spot of every image is named in the headline (`shortcut`, see
    `evidence.FixedRegion`): a person has to look whether the spot belongs to the object. With fewer than 6 good
    probes and no alarm, it is `too early to say`. Reported without alarm:
    dominance at the end, failed probes, drift (median rank correlation with the first maps below 0.3),
    heads that recovered, dormant heads, gradients that shrank everywhere.
    """
    rules = (
        _nonfinite, _diverged, _collapse, _vanishing, _nothing_learned,
        _shortcut, _too_early, _dominance, _failed, _moved, _harmless,
    )  # fmt: skip
    if not any(record.importance is not None for record in history.records):
        return Verdict("no probe", (Finding("failed_probes", "No probe succeeded, nothing can be said."),))
    findings = tuple(finding for rule in rules for finding in rule(history))
    first = next((finding.kind for finding in findings if finding.kind in _HEADLINES), None)
    return Verdict(_HEADLINES[first] if first else "healthy", findings)


def collapses(history: History) -> list[HeadCollapse]:
    """Every collapse of the run, in order of the step at which it was called."""
    events = [event for event in history.events if event.get("head") is not None]
    found = []
    for index, event in enumerate(events):
        if event["kind"] != "collapsed":
            continue
        cell = (event["layer"], event["head"])
        back = next(
            (
                later["step"]
                for later in events[index + 1 :]
                if later["kind"] == "recovered" and (later["layer"], later["head"]) == cell
            ),
            None,
        )
        name = event.get("layer_name") or f"layer {cell[0]}"
        found.append(HeadCollapse(*cell, name, event["step"], event.get("since_step", event["step"]), back))
    return found


def drift_from_first(history: History) -> np.ndarray:
    """Median rank correlation with the first maps over the images, `(probes,)`; NaN without maps."""
    return np.array([_median(_drift(record, "rank_correlation_first")) for record in history.records])


def ends(history: History) -> tuple[ProbeRecord, ProbeRecord]:
    """First and last record that has importance."""
    good = [record for record in history.records if record.importance is not None]
    return good[0], good[-1]


def _drift(record: ProbeRecord, key: str) -> np.ndarray:
    return np.asarray((record.drift or {}).get(key, ()), dtype=np.float64)


def _median(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if known.size else float("nan")


def _standing(history: History, begins: str, stops: str) -> list[dict[str, Any]]:
    standing: dict[tuple[Any, Any], dict[str, Any]] = {}
    for event in history.events:
        cell = (event.get("layer"), event.get("head"))
        if event["kind"] == begins:
            standing[cell] = event
        elif event["kind"] == stops:
            standing.pop(cell, None)
    return list(standing.values())


def _nonfinite(history: History) -> list[Finding]:
    steps = [event["step"] for event in history.events if event["kind"] == "nonfinite"]
    if not steps:
        return []
    times = "once" if len(steps) == 1 else f"at {len(steps)} probes"
    figures = {"probes": len(steps), "first_step": steps[0]}
    return [Finding("nonfinite", f"Importance was not finite {times}, first at step {steps[0]}.", figures)]


def _diverged(history: History) -> list[Finding]:
    name = loss_name(history)
    if name is None:
        return []
    logged = [(r.step, r.metrics[name]) for r in history.records if name in r.metrics]
    broken = next((step for step, value in logged if not np.isfinite(value)), None)
    if broken is not None:
        return [Finding("diverged", f"{name} was not finite at step {broken}.", {"step": broken})]
    values = np.array([value for _, value in logged], dtype=np.float64)
    if len(values) < 4:
        return []
    low, last = values.min(), float(np.median(values[-3:]))
    if last > LOSS_FACTOR * low and last - low > 0.5 * (values[0] - low) and last - low > 0.1:
        step = logged[int(values.argmin())][0]
        text = f"{name} rose from {low:.3g} at step {step} to {last:.3g} at the end."
        return [Finding("diverged", text, {"lowest": float(low), "lowest_step": step, "last": last})]
    return []


def _collapse(history: History) -> list[Finding]:
    left = [item for item in collapses(history) if item.recovered_step is None]
    if not left:
        return []
    latest = {(item.layer, item.head): item for item in left}
    places = [f"{item.layer_name} head {item.head} (step {item.step})" for item in latest.values()]
    shown = ", ".join(places[:6]) + (f" and {len(places) - 6} more" if len(places) > 6 else "")
    count = "1 head is" if len(places) == 1 else f"{len(places)} heads are"
    figures = {"heads": len(places), "first_step": min(item.step for item in latest.values())}
    return [Finding("collapse", f"{count} still collapsed at the end: {shown}.", figures)]


def _vanishing(history: History) -> list[Finding]:
    return [
        Finding(
            "layer_vanishing",
            f"{event['layer_name']} lost its gradient at step {event['step']}.",
            {"layer": event["layer"], "step": event["step"]},
        )
        for event in _standing(history, "layer_vanishing", "layer_restored")
    ]


def _nothing_learned(history: History) -> list[Finding]:
    accuracy, loss = accuracy_name(history), loss_name(history)
    texts, figures = [], {}
    if accuracy is not None:
        values = _known(history, accuracy)
        if len(values) < 3 or values.max() - values[0] >= ACCURACY_GAIN or values.max() >= 0.9:
            return []
        texts.append(f"{accuracy} began at {values[0]:.3f} and never passed {values.max():.3f}")
        figures |= {"accuracy_first": float(values[0]), "accuracy_best": float(values.max())}
    if loss is not None:
        values = _known(history, loss)
        if len(values) < 3 or values.min() < (1 - LOSS_FALL) * values[0]:
            return []
        texts.append(f"{loss} began at {values[0]:.3g} and never fell below {values.min():.3g}")
        figures |= {"loss_first": float(values[0]), "loss_lowest": float(values.min())}
    return [Finding("nothing_learned", "; ".join(texts) + ".", figures)] if texts else []


def _shortcut(history: History) -> list[Finding]:
    region = fixed_region(history)
    if region is None or not region.shortcut_like:
        return []
    advice = (
        "Evidence that does not move with the object is a watermark, a border or another shortcut more often than "
        "an object: cover those patches and see what the accuracy is worth."
    )
    figures = {"step": region.step, "share": region.share, "least": region.least, "share_first": region.first}
    return [Finding("shortcut", f"Shortcut-like evidence: {region.text}. {advice}", figures)]


def _too_early(history: History) -> list[Finding]:
    count = sum(record.importance is not None for record in history.records)
    if count >= LEAST_PROBES:
        return []
    text = f"{count} of at least {LEAST_PROBES} probes: heads are judged only after a warm-up."
    return [Finding("too_early", text, {"probes": count, "needed": LEAST_PROBES})]


def _known(history: History, name: str) -> np.ndarray:
    values = history.metric(name)
    return values[np.isfinite(values)]


def _dominance(history: History) -> list[Finding]:
    return [
        Finding(
            "dominance",
            f"{event['layer_name']} head {event['head']} holds most of its layer.",
            {"layer": event["layer"], "head": event["head"], "step": event["step"]},
        )
        for event in _standing(history, "dominance", "dominance_end")
    ]


def _failed(history: History) -> list[Finding]:
    failed = [record for record in history.records if record.failure is not None]
    if not failed:
        return []
    text = f"{len(failed)} of {len(history.records)} probes failed, first at step {failed[0].step}"
    figures = {"failed": len(failed), "probes": len(history.records), "first_step": failed[0].step}
    return [Finding("failed_probes", f"{text}: {failed[0].failure}", figures)]


def _moved(history: History) -> list[Finding]:
    values = drift_from_first(history)
    known = values[np.isfinite(values)]
    if len(known) < 2 or known[-1] >= DRIFT_LIMIT:
        return []
    text = "Explanations drifted away from the first probe: median rank correlation"
    return [Finding("drift", f"{text} {known[-1]:.2f} at the end.", {"rank_correlation": float(known[-1])})]


def _harmless(history: History) -> list[Finding]:
    found = []
    recovered = [item for item in collapses(history) if item.recovered_step is not None]
    if recovered:
        text = f"{len(recovered)} collapses were followed by recovery."
        found.append(Finding("recovered", text, {"collapses": len(recovered)}))
    dormant = _standing(history, "dormant", "woke")
    if dormant:
        found.append(Finding("dormant", f"{len(dormant)} heads never came alive.", {"heads": len(dormant)}))
    if _standing(history, "global_shrink", "global_restored"):
        text = "Gradients shrank in all layers alike, as they do in a confident model or at a decayed rate."
        found.append(Finding("global_shrink", text))
    return found
