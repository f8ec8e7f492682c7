"""--diversity-schedule: how D's weight changes over the steps."""

import json

from support.registry import SCHEDULES


def steps_done(session, step):
    """The fraction of the run's steps that are done, from 0 to 1."""
    return step / max(1, session.args.steps - 1)


@SCHEDULES.add("rising", "from 0 to 2 in a straight line")
def rising(session, step, diversity):
    """The factor of D's weight: from 0 at the first step to 2 at the last."""
    return 2 * steps_done(session, step)


@SCHEDULES.add("falling", "from 2 to 0 in a straight line")
def falling(session, step, diversity):
    """The factor of D's weight: from 2 at the first step to 0 at the last."""
    return 2 - 2 * steps_done(session, step)


@SCHEDULES.add("held", "by the fraction of D that was lost since the first step: 1 for a tenth of "
                       "it, at most 4")
def held(session, step, diversity):
    """The factor of D's weight: 10 times the fraction of D that was lost, from 0 to 4. diversity:
    the mean D of the step's completions, over all ranks. It is compared with that of the first step
    that sampled, which is read from the log after a resume."""
    if session.first_diversity is None:
        session.first_diversity = first_logged_D(session, step, diversity)
    first = session.first_diversity
    lost = (first - diversity) / abs(first) if first else 0.0
    return min(max(10 * lost, 0.0), 4.0)


def first_logged_D(session, step, diversity):
    """The first D in the run's log; `diversity` if there is none."""
    if not step:
        return diversity
    log = session.run.folder / "metrics.jsonl"
    if not log.exists():
        return diversity
    for text in log.read_text(encoding="utf-8").splitlines():
        line = json.loads(text) if text else {}
        if "D" in line:
            return line["D"]
    return diversity
