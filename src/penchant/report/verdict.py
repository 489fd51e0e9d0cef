"""What came of a run, first as figures, then in plain sentences."""

from __future__ import annotations

from dataclasses import dataclass

from penchant.report.figures import Number, number, percent
from penchant.report.rundir import HELD_OUT, RunRecord, as_mapping
from penchant.report.series import finite
from penchant.report.units import Ends, Unit

ACCURACY = "rewards/accuracies"


@dataclass(frozen=True)
class Change:
    """A held-out measurement before training (None when there was none at step 0) and at its last step."""

    before: Number | None
    after: Number | None
    lowest: Number | None
    diverged: bool


@dataclass(frozen=True)
class Accuracy:
    """The share of held-out couples whose better completion has the higher reward, and what to hold it against.

    Which couples those are is a matter of the unit. `interval` is the one of 95 % around `after`, None where the unit
    has none or the number of examples is unknown.
    """

    unit: Unit
    before: Number | None
    after: Number
    num_examples: int | None
    interval: Ends | None
    longer_wins: Number | None
    starts_at_reference: bool


@dataclass(frozen=True)
class Judged:
    """What a judge says of held-out answers: a mean and its 95% interval over the prompts."""

    value: Number
    low: Number
    high: Number


def judged(run: RunRecord, name: str) -> Judged | None:
    """One of the figures under `answers` in the summary: score, score_before, difference, win_rate."""
    found = as_mapping(as_mapping(run.summary.get("answers")).get(name))
    values = [finite(found.get(key)) for key in ("value", "low", "high")]
    return None if any(value is None for value in values) else Judged(*values)  # type: ignore[arg-type]


def change(run: RunRecord, name: str) -> Change:
    """How the held-out measurement `name` went from step 0 to the end."""
    series = run.series(HELD_OUT + name)
    before = series.points[0][1] if series.points and series.points[0][0] == 0 else None
    values = [value for step, value in series.finite if step > 0]
    return Change(before, values[-1] if values else None, min(values, default=None), series.ends_broken)


def held_out_accuracy(run: RunRecord) -> Accuracy | None:
    """The held-out accuracy after training; None when there is none after step 0."""
    measured = change(run, ACCURACY)
    if measured.after is None:
        return None
    unit = run.unit("eval")
    means = [change(run, name).before for name in ("rewards/chosen", "rewards/rejected")]
    return Accuracy(
        unit=unit,
        before=measured.before,
        after=measured.after,
        num_examples=num_held_out(run),
        interval=unit.interval(measured.after, run.part("eval")),
        longer_wins=longer_wins(run),
        # A policy that is its own reference has rewards of 0 but for rounding: who is ahead is then an accident.
        starts_at_reference=all(mean is not None and abs(mean) < 1e-4 for mean in means),
    )


def num_held_out(run: RunRecord) -> int | None:
    """The number of held-out examples; None when the data findings do not tell."""
    used = finite(run.part("eval").get("used"))
    return int(used) if used is not None and used >= 1 else None


def longer_wins(run: RunRecord) -> Number | None:
    """The share of examples whose first completion is longer than the last: of held-out examples if there are any."""
    share = finite(run.part("eval").get("longer_wins"))
    return share if share is not None else finite(run.part("train").get("longer_wins"))


def has_held_out(run: RunRecord) -> bool:
    """Whether anything was ever measured on held-out examples."""
    return any(name.startswith(HELD_OUT) for name in run.metrics)


def tail_mean(run: RunRecord, name: str) -> tuple[Number, int] | None:
    """The mean of a training measurement over the last tenth of its lines, and the number of those lines."""
    values = [value for _, value in run.series(name).finite]
    if not values:
        return None
    tail = values[-max(1, len(values) // 10) :]
    return sum(tail) / len(tail), len(tail)


def headline(run: RunRecord) -> list[str]:
    """The verdict itself: how accurate, and whether length alone would do as well."""
    accuracy, answers = held_out_accuracy(run), on_answers(run)
    if accuracy is not None:
        answers += _accuracy(accuracy)
    sentences = [*_status(run), *(answers or _on_training_examples(run))]
    if not run.metrics:
        sentences.append("Nothing has been measured yet.")
    return sentences


def details(run: RunRecord) -> list[str]:
    """What else belongs to the verdict: loss, distance from the reference, chosen log-probability, trouble."""
    return [*_loss(run), *_distance(run), *_chosen_logps(run), *_trouble(run)]


def _status(run: RunRecord) -> list[str]:
    steps = finite(run.summary.get("steps"))
    so_far = "the figures are those written so far" if not steps else f"the figures go up to step {number(steps)}"
    match run.summary.get("status"):
        case "running":
            return [f"This run was still going when the report was made; {so_far}."]
        case "stopped":
            return [f"The watch stopped this run before its end, as watch.stop_on asks for; {so_far}."]
        case "interrupted":
            return [f"This run was interrupted before its end; {so_far}."]
        case "failed":
            return [f"This run failed; {so_far}, and the events say why."]
    return []


def on_answers(run: RunRecord) -> list[str]:
    """What the judge says of the answers to held-out prompts, against those from before training."""
    num = finite(as_mapping(run.summary.get("answers")).get("prompts"))
    gain, before, after, wins = (judged(run, name) for name in ("difference", "score_before", "score", "win_rate"))
    sentences = []
    if gain and before and after:
        clear = "" if gain.low > 0 or gain.high < 0 else ", which is no clear difference"
        sentences.append(
            f"On {number(num)} held-out prompts the mean score of the policy's answers went from "
            f"{number(before.value)} to {number(after.value)}: a change of {number(gain.value)} (95% interval "
            f"{number(gain.low)} to {number(gain.high)}){clear}."
        )
    if wins:
        sentences.append(
            f"Against its answers from before training it wins {percent(wins.value)} (95% interval {percent(wins.low)} "
            f"to {percent(wins.high)}), ties counting half."
        )
    if sentences and (kl := change(run, "answer_kl").after) is not None:
        sentences.append(f"On these answers it is {number(kl)} nats a completion away from its reference (KL).")
    return sentences


def _accuracy(accuracy: Accuracy) -> list[str]:
    sentence = f"After training, {accuracy.unit.agreement(accuracy.after, accuracy.num_examples)}"
    if accuracy.interval:
        low, high = accuracy.interval
        sentence += f" (95% interval {percent(low)} to {percent(high)})"
    if accuracy.before is not None and not accuracy.starts_at_reference:
        sentence += f"; before training it was {percent(accuracy.before)}"
        if accuracy.interval and accuracy.interval[0] <= accuracy.before <= accuracy.interval[1]:
            sentence += ", which is no clear difference"
    sentences = [sentence + "."]
    if accuracy.interval and accuracy.interval[0] <= 0.5 <= accuracy.interval[1]:
        sentences.append("That is not clearly different from tossing a coin.")
    if accuracy.before is not None and accuracy.starts_at_reference:
        sentences.append(
            f"The {percent(accuracy.before)} measured before training says nothing: the model is then its own "
            "reference, and all rewards are zero."
        )
    return sentences + _against_length(accuracy)


def _against_length(accuracy: Accuracy) -> list[str]:
    share = accuracy.longer_wins
    if share is None:
        return []
    rule = f"Always picking the longer completion would be right in {percent(share)} of these {accuracy.unit.plural}"
    if share < 0.5:
        rule += f", always the shorter one in up to {percent(1 - share)}"
    rule += accuracy.unit.ends_only
    best = max(share, 1 - share)
    if accuracy.interval is None:
        return [rule + "."]
    low, high = accuracy.interval
    if low > best:
        return [rule + ": the model does better than length alone."]
    if high < best:
        return [rule + f": on these {accuracy.unit.plural} length alone would do better than the model."]
    return [rule + ": this result does not rule out that the model goes by length alone."]


def _on_training_examples(run: RunRecord) -> list[str]:
    sentences = []
    unit = run.unit("train")
    if change(run, "loss").after is not None and not run.series(HELD_OUT + ACCURACY).points:
        examples = run.unit("eval").counted(num_held_out(run))
        sentences.append(f"Among {examples} there is no couple of a better and a worse one, so there is no accuracy.")
    elif has_held_out(run):
        sentences.append(f"Nothing was measured on held-out {run.unit('eval').plural} after training began.")
    elif run.metrics:
        sentences.append(
            f"No {unit.plural} were held out, so nothing here tells how the model does on {unit.plural} it has not "
            "seen."
        )
    mean = tail_mean(run, ACCURACY)
    if mean is not None:
        lines = "line" if mean[1] == 1 else f"{number(mean[1])} lines"
        sentences.append(
            f"On the training {unit.plural} of the last {lines} of the log the {unit.better} completion had the higher "
            f"reward in {percent(mean[0])} of the {unit.couples}; that is a figure about {unit.plural} being learned, "
            "and no evidence for others."
        )
    return sentences


def _loss(run: RunRecord) -> list[str]:
    loss = change(run, "loss")
    if loss.before is None or loss.after is None or loss.lowest is None:
        series = run.series("loss")
        if len(series.finite) < 2:
            return []
        return [f"The training loss went from {number(series.first)} to {number(series.last)}."]
    verb = "fell" if loss.after < loss.before else "rose"
    sentence = f"The held-out loss {verb} from {number(loss.before)} to {number(loss.after)}"
    if number(loss.before) == number(loss.after):
        sentence = f"The held-out loss stayed at {number(loss.after)}"
    if loss.after > loss.lowest + 0.02 * abs(loss.lowest):
        sentence += f", having been as low as {number(loss.lowest)}: fewer steps may do better"
    return [sentence + "."]


def _distance(run: RunRecord) -> list[str]:
    kl, where = change(run, "kl").after, "held-out"
    if kl is None:
        kl, where = run.series("kl").last, "training"
    if kl is None:
        return []
    return [f"On the {where} completions it has moved {number(kl)} nats per token away from its reference (KL)."]


def _chosen_logps(run: RunRecord) -> list[str]:
    logps = change(run, "logps/chosen")
    if logps.before is None or logps.after is None:
        return []
    unit = run.unit("eval")
    those = f"The {unit.first} completions".replace("  ", " ")
    values = f"from {number(logps.before)} to {number(logps.after)} nats"
    rejected = change(run, "logps/rejected")
    if logps.after >= logps.before:
        return [f"{those} became more probable, {values}."]
    sentence = f"{those} themselves became less probable, {values}"
    if rejected.before is not None and rejected.after is not None:
        gap = (logps.after - rejected.after) - (logps.before - rejected.before)
        if gap > 0:
            sentence += "; the margin grew because the " + unit.last + " ones fell further"
    return [sentence + "."]


def _trouble(run: RunRecord) -> list[str]:
    sentences = []
    if run.series("loss").ends_broken or change(run, "loss").diverged:
        sentences.append("The last loss is not a finite number: the training has diverged.")
    serious = sum(event.get("severity") in ("major", "stop") for event in run.events)
    if serious:
        count = "is 1 serious event" if serious == 1 else f"are {number(serious)} serious events"
        sentences.append(f"There {count}, told under Events.")
    return sentences
